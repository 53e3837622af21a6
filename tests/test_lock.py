"""One run folder, one job: a second one is refused, and a dead one's lock is taken over."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from crate_dist import lock as lock_module
from crate_dist.lock import Holder, RunIsLocked, RunLock
from tests.ranks import REPOSITORY

HOLD = """
import sys, time
from pathlib import Path
from crate_dist.lock import RunLock
with RunLock(Path(sys.argv[1]), heartbeat_s=0.1, stale_s=1.0):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_by_another_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock until its standard input ends."""
    command = [sys.executable, "-c", HOLD, str(path)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.lock"


@pytest.fixture
def elsewhere() -> Holder:
    """A holder on a machine of which nothing is known."""
    return Holder("token", "another-machine", 1, "boot", "1", job="", restart="0")


def quick(path: Path) -> RunLock:
    return RunLock(path, heartbeat_s=0.1, stale_s=1.0)


def test_it_is_there_while_it_is_held_and_gone_afterwards(path: Path) -> None:
    with quick(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(path.parent.iterdir()) == []


def test_a_second_job_is_refused_while_the_first_lives(path: Path) -> None:
    with held_by_another_process(path) as holder:
        with pytest.raises(RunIsLocked, match=rf"in use by process {holder.pid} on .*--run-dir"), quick(path):
            pytest.fail("two hold the lock")
        holder.communicate("")
        with quick(path):
            pass


def test_one_that_was_killed_on_this_machine_is_replaced_at_once(path: Path) -> None:
    with held_by_another_process(path) as holder:
        os.kill(holder.pid, signal.SIGKILL)
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # it is dead, and nobody has asked for its status
        began = time.monotonic()
        with RunLock(path):
            assert time.monotonic() - began < 1
            assert json.loads(path.read_text())["pid"] == os.getpid()


def test_another_process_with_the_dead_ones_id_is_not_taken_for_it(path: Path) -> None:
    with quick(path):
        mine = Holder(**json.loads(path.read_text()))
    path.write_text(json.dumps(asdict(replace(mine, token="of a process that had our id", began="1"))))
    began = time.monotonic()
    with RunLock(path):
        assert time.monotonic() - began < 1


def test_a_process_of_before_a_reboot_is_dead(path: Path) -> None:
    with quick(path):
        mine = Holder(**json.loads(path.read_text()))
    assert not mine.surely_dead()
    assert replace(mine, boot="another").surely_dead()


def test_a_job_that_was_requeued_knows_that_its_former_self_is_dead(
    elsewhere: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert replace(elsewhere, job="17", restart="1").surely_dead()
    assert not replace(elsewhere, job="17", restart="2").surely_dead()
    assert not replace(elsewhere, job="18", restart="1").surely_dead()


def test_one_on_another_machine_is_replaced_when_it_has_been_silent_for_long(path: Path, elsewhere: Holder) -> None:
    path.write_text(json.dumps(asdict(elsewhere)))
    began = time.monotonic()
    with quick(path):
        assert 1.0 <= time.monotonic() - began < 5
        assert json.loads(path.read_text())["host"] == platform.node()


def test_a_heartbeat_from_another_machine_keeps_its_lock(
    path: Path, elsewhere: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held_by_another_process(path):
        monkeypatch.setattr(lock_module.platform, "node", lambda: "this-machine")
        with pytest.raises(RunIsLocked), quick(path):
            pytest.fail("two hold the lock")


def test_a_clock_that_was_set_back_does_not_make_it_look_dead(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held_by_another_process(path):
        os.utime(path, (2e9, 2e9))
        monkeypatch.setattr(lock_module.platform, "node", lambda: "this-machine")
        with pytest.raises(RunIsLocked), quick(path):
            pytest.fail("two hold the lock")


def test_a_lock_that_cannot_be_read_is_waited_for_and_replaced(path: Path) -> None:
    path.write_text("{")
    with quick(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def _race(path: Path, start: float, racers: int) -> None:
    time.sleep(max(start - time.time(), 0))
    winners, losers = path.with_name("winners"), path.with_name("losers")
    try:
        with quick(path):
            _note(winners)
            while _notes(winners) + _notes(losers) < racers:
                time.sleep(0.02)
    except RunIsLocked:
        _note(losers)


def _note(path: Path) -> None:
    with path.open("a") as file:
        file.write(".")


def _notes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_of_several_that_take_over_from_a_dead_one_exactly_one_wins(path: Path, elsewhere: Holder) -> None:
    dead = replace(elsewhere, host=platform.node())
    assert dead.surely_dead()
    fork = multiprocessing.get_context("fork")
    for attempt in range(5):
        folder = path.parent / str(attempt)
        folder.mkdir()
        (folder / path.name).write_text(json.dumps(asdict(dead)))
        racers = [fork.Process(target=_race, args=(folder / path.name, time.time() + 0.2, 4)) for _ in range(4)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        assert sorted((p.name, _notes(p)) for p in folder.iterdir()) == [("losers", 3), ("winners", 1)]
