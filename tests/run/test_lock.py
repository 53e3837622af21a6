"""One run folder, one writer: whoever may be alive is waited for, and whoever has lost the folder learns it."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from crate_dist.run import holder as holder_module
from crate_dist.run import lock as lock_module
from crate_dist.run.exit_status import LOST_THE_RUN
from crate_dist.run.holder import Holder
from crate_dist.run.lock import LostTheRun, RunIsLocked, RunLock
from tests.ranks import REPOSITORY

LEASE_S = 0.6
HOLD = f"""
import sys, time
from pathlib import Path
from crate_dist.run.lock import RunLock
with RunLock(Path(sys.argv[1]), lease_s={LEASE_S}) as lock:
    print("held", flush=True)
    sys.stdin.readline()
    lock.check()
    print("still held", flush=True)
"""


@contextmanager
def held_by_another_process(path: Path, *around: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock until it reads a line. around: a command that runs it, such as unshare."""
    process = subprocess.Popen(
        [*around, sys.executable, "-c", HOLD, str(path)],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "lock"


@pytest.fixture
def elsewhere() -> Holder:
    """A holder on a machine of which nothing is known."""
    return Holder("token", "another-machine", 1, "machine", "1", lease_s=LEASE_S)


def quick(path: Path, lost: Callable[[str], None] = lambda why: None) -> RunLock:
    return RunLock(path, lease_s=LEASE_S, lost=lost)


def put(path: Path, holder: Holder, number: int = 1) -> None:
    """Makes a number, as `holder` would."""
    path.mkdir(exist_ok=True)
    (path / f"{number:08d}").write_text(json.dumps(asdict(holder)))


def newest(path: Path) -> Holder:
    """Reads the holder that has made the newest number."""
    return Holder(**json.loads((path / max((n for n in os.listdir(path) if n.isdecimal()), key=int)).read_text()))


def on_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this process knows nothing of other processes."""
    monkeypatch.setattr(holder_module, "_machine", lambda: "another one")


def test_it_names_its_holder_and_afterwards_says_that_it_is_free(path: Path) -> None:
    with quick(path):
        assert newest(path).pid == os.getpid()
        assert not newest(path).free
    assert newest(path).free
    assert len(list(path.iterdir())) == 1


def test_a_later_holder_has_a_greater_number_for_ever(path: Path) -> None:
    numbers = []
    for _ in range(3):
        with quick(path) as lock:
            numbers.append(lock.tenure.number)
    assert numbers == sorted(set(numbers))


def test_a_second_job_is_refused_at_once_while_the_first_lives(path: Path) -> None:
    with held_by_another_process(path) as holder:
        began = time.monotonic()
        with pytest.raises(RunIsLocked, match=rf"in use by process {holder.pid} on .*--run-dir"), quick(path):
            pytest.fail("two hold the lock")
        assert time.monotonic() - began < 0.3
        holder.communicate("\n")
        with quick(path):
            pass


def test_one_that_is_stopped_on_this_machine_is_not_dead(path: Path) -> None:
    with held_by_another_process(path) as holder:
        holder.send_signal(signal.SIGSTOP)
        time.sleep(3 * LEASE_S)
        with pytest.raises(RunIsLocked), quick(path):
            pytest.fail("two hold the lock")


def test_one_that_was_killed_on_this_machine_is_replaced_at_once(path: Path) -> None:
    with held_by_another_process(path) as holder:
        os.kill(holder.pid, signal.SIGKILL)
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # it is dead, and nobody has asked for its status
        began = time.monotonic()
        with RunLock(path):
            assert time.monotonic() - began < 1
            assert newest(path).pid == os.getpid()


def test_another_process_with_the_dead_ones_id_is_not_taken_for_it(path: Path) -> None:
    with quick(path):
        mine = newest(path)
    put(path, replace(mine, token="of a process that had our id", began="1"), 100)
    began = time.monotonic()
    with RunLock(path):
        assert time.monotonic() - began < 1


def test_one_on_another_machine_is_replaced_when_it_has_been_silent_for_two_leases(
    path: Path, elsewhere: Holder
) -> None:
    put(path, elsewhere)
    began = time.monotonic()
    with quick(path):
        assert 2 * LEASE_S <= time.monotonic() - began < 5
        assert newest(path).pid == os.getpid()


def test_a_sign_of_life_from_another_machine_keeps_its_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held_by_another_process(path):
        on_another_machine(monkeypatch)
        with pytest.raises(RunIsLocked), quick(path):
            pytest.fail("two hold the lock")


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("unshare"), reason="needs root and unshare")
def test_a_holder_in_another_process_namespace_is_not_believed_to_be_dead(path: Path) -> None:
    with held_by_another_process(path, "unshare", "--pid", "--fork", "--mount-proc", "--kill-child"):
        assert newest(path).pid != os.getpid()
        with pytest.raises(RunIsLocked), quick(path):
            pytest.fail("two hold the lock")


def test_a_holder_that_was_stopped_ends_when_another_has_taken_over(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_another_machine(monkeypatch)
    with held_by_another_process(path) as stopped:
        stopped.send_signal(signal.SIGSTOP)
        with quick(path) as lock:
            stopped.send_signal(signal.SIGCONT)
            stopped.communicate("\n")
            assert stopped.returncode in (1, LOST_THE_RUN)  # by check(), or by itself
            lock.check()


def test_the_start_that_slurm_made_of_a_job_elsewhere_waits_for_its_former_self_which_leaves(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    on_another_machine(monkeypatch)
    with held_by_another_process(path, SLURM_RESTART_COUNT="1") as former:
        began = time.monotonic()
        with quick(path):
            assert time.monotonic() - began < 2 * LEASE_S
            assert former.wait(10) == LOST_THE_RUN
    with held_by_another_process(path, SLURM_RESTART_COUNT="3"), pytest.raises(RunIsLocked), quick(path):
        pytest.fail("an older start took it from a newer one")


def test_an_srun_that_has_ended_in_the_same_allocation_leaves_a_free_lock(
    elsewhere: Holder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "3", "SLURM_RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(name, value)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$3" = 17.2 ] && exit 0\necho "Job step $3 not found" >&2\nexit 1\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    before = replace(elsewhere, job="17", restart="2", start="1")
    assert replace(before, step="1").surely_gone()
    assert not replace(before, step="2").surely_gone()  # SLURM knows it
    assert not replace(before, step="1", restart="1").surely_gone()
    assert not replace(before, step="1", job="18").surely_gone()
    monkeypatch.setenv("CRATE_ENDED_STEPS", "17.2.1")
    assert replace(before, step="2").surely_gone()  # and the batch script has seen it end
    assert not replace(before, start="2", step="2").surely_gone()


def test_a_lock_can_be_handed_over_without_a_moment_in_which_it_is_free(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    with quick(path, told.append) as launchers, held_by_another_process(path, **launchers.environment()) as rank:
        with pytest.raises(LostTheRun):
            launchers.check()
        with pytest.raises(RunIsLocked), quick(path):
            pytest.fail("two hold the lock")
        rank.communicate("\n")
        assert rank.returncode == 0
    assert newest(path).free


def test_a_launcher_that_opens_the_folder_is_waited_for(path: Path) -> None:
    lock = RunLock(path, lease_s=LEASE_S, brief=True)
    with lock:
        leaving = threading.Timer(2 * LEASE_S, lambda: lock.__exit__(None, None, None))
        leaving.start()
        with RunLock(path, lease_s=LEASE_S):
            assert not leaving.is_alive()


def test_a_lock_that_cannot_be_read_is_waited_for_and_replaced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.mkdir()
    (path / "00000007").write_text("{")
    monkeypatch.setattr(RunLock, "_holder", _with_short_lease(RunLock._holder))
    with quick(path) as lock:
        assert lock.tenure.number == 8


def _with_short_lease(holder: Callable[[RunLock, int], Holder]) -> Callable[[RunLock, int], Holder]:
    return lambda lock, number: replace(holder(lock, number), lease_s=LEASE_S)


def test_a_job_of_an_older_version_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "_OLD_LEASE_S", LEASE_S)
    old = path.with_name("run.lock")
    old.write_text("{}")
    end = threading.Event()

    def touch() -> None:
        while not end.wait(0.1):
            os.utime(old)

    toucher = threading.Thread(target=touch)
    toucher.start()
    with pytest.raises(RunIsLocked, match="older version"), quick(path):
        pytest.fail("two hold the lock")
    end.set()
    toucher.join()
    with quick(path):
        assert not old.exists()


def test_a_job_whose_lock_was_removed_ends(path: Path) -> None:
    told: list[str] = []
    with quick(path, told.append) as lock:
        shutil.rmtree(path)
        with pytest.raises(LostTheRun, match="removed the lock"):
            lock.check()
        time.sleep(LEASE_S / 2)
        assert told
    with quick(path) as again:
        assert again.tenure.number > lock.tenure.number


def test_a_job_whose_storage_is_away_keeps_its_lock(path: Path) -> None:
    with quick(path) as lock:
        away = path.parent.rename(path.parent.with_name("away"))
        time.sleep(2 * LEASE_S)
        with pytest.raises(FileNotFoundError):
            lock.check()
        away.rename(path.parent)
        lock.check()


def test_who_removes_the_lock_of_a_living_job_ends_that_job(path: Path) -> None:
    told: list[str] = []
    with quick(path, told.append) as lock:
        shutil.rmtree(path)
        with quick(path):
            with pytest.raises((LostTheRun, OSError)):
                lock.check()
            time.sleep(LEASE_S)
            assert told


@pytest.mark.parametrize("refusal", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_it_works_where_the_file_system_has_no_links(
    path: Path, elsewhere: Holder, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    def link(*_: object) -> None:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "link", link)
    with quick(path) as lock:
        with pytest.raises(RunIsLocked), quick(path):
            pytest.fail("two hold the lock")
        time.sleep(LEASE_S)
        lock.check()
    assert newest(path).free


def test_a_link_that_was_made_although_the_server_says_that_it_was_there_is_ours(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def retransmitted(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(os, "link", retransmitted)
    with quick(path) as lock:
        time.sleep(LEASE_S)
        lock.check()


def test_listings_that_are_minutes_old_let_nobody_in_beside_a_living_holder(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held_by_another_process(path) as holder:
        on_another_machine(monkeypatch)
        old = RunLock._numbers(quick(path))
        numbers, since = RunLock._numbers, time.monotonic()

        def cached(lock: RunLock) -> list[int]:
            return old if time.monotonic() - since < 4 * LEASE_S else numbers(lock)

        monkeypatch.setattr(RunLock, "_numbers", cached)
        with pytest.raises(RunIsLocked), quick(path):
            pytest.fail("two hold the lock")
        assert time.monotonic() - since > 2 * LEASE_S, "it was not the listing that misled it"
        said, _ = holder.communicate("\n")
        assert "still held" in said


def test_a_start_that_slept_over_its_decision_does_not_get_a_number_that_has_become_free_again(
    path: Path, elsewhere: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saw the dead one's number 1 and is to make number 2; meanwhile another has made 2 to 90 and removed most."""
    put(path, elsewhere)
    late = quick(path)
    put(path, replace(elsewhere, token="another"), 90)
    (path / "00000001").unlink()
    assert not late._make(2, late._me)
    assert newest(path).token == "another"


def test_of_three_that_take_over_in_the_worst_order_one_wins_and_keeps_it(
    path: Path, elsewhere: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three have seen the same dead holder before any of them makes the next number."""
    put(path, elsewhere)
    monkeypatch.setattr(Holder, "surely_alive", lambda self: False)  # in one process they would know each other
    together, make = threading.Barrier(3), RunLock._make
    first: set[int] = set()

    def all_at_once(lock: RunLock, number: int, holder: Holder) -> bool:
        if id(lock) not in first:
            first.add(id(lock))
            together.wait()
        return make(lock, number, holder)

    monkeypatch.setattr(RunLock, "_make", all_at_once)
    held, refused = [], []
    over = threading.Barrier(3)

    def start() -> None:
        try:
            with quick(path) as lock:
                held.append(lock)
                over.wait(20)
                lock.check()
        except RunIsLocked as error:
            refused.append(error)
            over.wait(20)

    starts = [threading.Thread(target=start) for _ in range(3)]
    for thread in starts:
        thread.start()
    for thread in starts:
        thread.join()
    assert (len(held), len(refused)) == (1, 2)


def test_a_full_disk_costs_nobody_the_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with quick(path) as lock:
        with monkeypatch.context() as full:
            full.setattr(Path, "write_text", _no_space)
            time.sleep(2 * LEASE_S)
            with pytest.raises(OSError, match="No space"):
                lock.check()
        lock.check()


def _no_space(*_: object, **__: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


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
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def test_of_several_that_take_over_from_a_dead_one_exactly_one_wins(path: Path, elsewhere: Holder) -> None:
    fork = multiprocessing.get_context("fork")
    for attempt in range(5):
        folder = path.parent / str(attempt)
        folder.mkdir()
        put(folder / "lock", replace(elsewhere, lease_s=0.05))
        racers = [fork.Process(target=_race, args=(folder / "lock", time.time() + 0.2, 4)) for _ in range(4)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        assert (_notes(folder / "losers"), _notes(folder / "winners")) == (3, 1)
