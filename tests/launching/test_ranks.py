"""launch/local.py: all ranks end well, or all of them end, and none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from crate_dist.launching import ranks as local_ranks
from crate_dist.launching.ranks import RankFailed, rank_environment, run_ranks, visible_gpus
from crate_dist.run.folder import RunFolder
from tests.ranks import REPOSITORY

NO_END = ["--set", "train.epochs=1000"]


def local(*arguments: str | Path) -> list[str]:
    """The command line of launch/local.py."""
    return [sys.executable, str(REPOSITORY / "launch" / "local.py"), *map(str, arguments)]


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
    """Polls; fails the test after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {timeout_s} s"
        time.sleep(0.05)


def processes_of(run_dir: Path) -> dict[int, int]:
    """Rank of each process, loader workers included, that trains this run: {pid: rank}."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            variables = dict(item.split(b"=", 1) for item in (entry / "environ").read_bytes().split(b"\0") if item)
            dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (OSError, ValueError):
            continue
        if b"crate_dist.train" in words and str(run_dir).encode() in words and not dead:
            found[int(entry.name)] = int(variables[b"RANK"])
    return found


@contextmanager
def launched(recipe: Path, shards: Path, run_dir: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """launch/local.py on two ranks, killed at the end if it still runs."""
    launcher = subprocess.Popen(
        local("--config", recipe, "--data", shards, "--run-dir", run_dir, "--ranks", "2", *arguments),
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # The tests may run in the background of a shell, where Ctrl-C is ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield launcher
    finally:
        launcher.kill()
        launcher.communicate()


def lines(run_dir: Path) -> int:
    """Counts the lines of metrics.jsonl."""
    metrics = RunFolder(run_dir).metrics
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.mark.spawn
def test_it_trains_to_the_end_and_goes_on_where_it_was_killed(
    small_recipe: Path, cast_shards: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with launched(small_recipe, cast_shards, run_dir) as launcher:
        wait_until(lambda: lines(run_dir) >= 7, "seventh step")
        launcher.kill()
        # The kernel ends the ranks with their launcher; loader workers look after their rank every few seconds.
        wait_until(lambda: not processes_of(run_dir), "end of all processes", timeout_s=20)
    with launched(small_recipe, cast_shards, run_dir) as launcher:
        said, _ = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, said
    assert f"{run_dir} (goes on)" in said
    assert "resumed from" in said
    assert "step 25/25" in said
    assert "step 25/25" not in RunFolder(run_dir).log_file(1).read_text()
    assert RunFolder(run_dir).model("last").exists()


@pytest.mark.spawn
def test_when_a_rank_is_killed_the_others_are_ended_at_once(
    small_recipe: Path, cast_shards: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with launched(small_recipe, cast_shards, run_dir, *NO_END) as launcher:
        wait_until(lambda: lines(run_dir) >= 2, "second step")
        victim = min(pid for pid, rank in processes_of(run_dir).items() if rank == 1)
        os.kill(victim, signal.SIGKILL)
        began = time.monotonic()
        said, _ = launcher.communicate(timeout=60)
    assert time.monotonic() - began < local_ranks.SIBLING_GRACE_S + 5
    assert launcher.returncode == 128 + signal.SIGKILL
    assert "error: rank 1 was killed by SIGKILL (by somebody, or by the kernel for want of memory" in said
    assert str(RunFolder(run_dir).log_file(1)) in said
    assert not processes_of(run_dir)


@pytest.mark.spawn
def test_ctrl_c_ends_all_ranks(small_recipe: Path, cast_shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with launched(small_recipe, cast_shards, run_dir, *NO_END) as launcher:
        wait_until(lambda: lines(run_dir) >= 2, "second step")
        launcher.send_signal(signal.SIGINT)
        said, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 130
    assert "stopped; the same command goes on from the newest checkpoint" in said
    assert not processes_of(run_dir)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run folder with nothing but a place for logs."""
    made = RunFolder(tmp_path / "run")
    made.logs.mkdir(parents=True)
    return made


def python(code: str) -> list[str]:
    """A rank that does as told."""
    return [sys.executable, "-c", f"import os, signal, sys, time; rank = int(os.environ['RANK'])\n{code}"]


def test_the_error_of_a_rank_is_shown_and_is_the_exit_status(folder: RunFolder) -> None:
    code = "time.sleep(60) if rank else None\nraise SystemExit('no such thing')"
    with pytest.raises(RankFailed, match="rank 0 ended with exit status 1") as caught:
        run_ranks(python(code), 3, folder)
    assert caught.value.exit_status == 1
    with pytest.raises(RankFailed, match=r"(?s)rank 1 ended with exit status 1.*no such thing"):
        run_ranks(python("time.sleep(60) if rank != 1 else sys.exit('no such thing')"), 3, folder)


def test_a_rank_that_will_not_listen_is_killed_with_its_children(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_ranks, "SIBLING_GRACE_S", 0.5)
    code = """
if rank == 1:
    time.sleep(0.5)
    sys.exit(3)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = os.fork()
if child:
    open(f"{sys.argv[1]}/children", "w").write(f"{os.getpid()} {child}")
time.sleep(60)
"""
    with pytest.raises(RankFailed):
        run_ranks([*python(code), str(folder.path)], 2, folder)
    for pid in (folder.path / "children").read_text().split():
        status = Path("/proc", pid, "status")
        wait_until(lambda: not status.exists() or "State:\tZ" in status.read_text(), "end of it", timeout_s=5)  # noqa: B023


def test_sigterm_gives_ranks_time_and_a_second_one_does_not(folder: RunFolder) -> None:
    stubborn = """
def stop(*_):
    open(f"{sys.argv[1]}/told-{rank}", "w")
signal.signal(signal.SIGTERM, stop)
open(f"{sys.argv[1]}/ready-{rank}", "w")
while True: time.sleep(0.1)
"""
    program = """
import sys
from pathlib import Path
from crate_dist.launching.ranks import run_ranks
from crate_dist.run.folder import RunFolder
run_ranks(sys.argv[2:], 2, RunFolder(Path(sys.argv[1])))
"""
    launcher = subprocess.Popen([sys.executable, "-c", program, folder.path, *python(stubborn), folder.path])
    for word in ("ready", "told"):
        wait_until(lambda: len(list(folder.path.glob(f"{word}-*"))) == 2, word, timeout_s=20)  # noqa: B023
        assert launcher.poll() is None
        launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=10) == 128 + signal.SIGTERM


def test_ranks_know_their_place_and_share_the_cores(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code = "print(*(os.environ[x] for x in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_PORT', 'OMP_NUM_THREADS')))"
    run_ranks(python(code), 3, folder)
    said = [folder.log_file(rank).read_text().split() for rank in (1, 2)]
    cores = max(1, len(os.sched_getaffinity(0)) // 3)
    assert [words[:3] for words in said] == [["1", "1", "3"], ["2", "2", "3"]]
    assert said[0][3] == said[1][3]
    assert said[0][4] == str(cores)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert rank_environment(0, 3, 1)["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize(
    ("value", "count"),
    [
        ("0,1,3", 3),
        ("", 0),
        ("-1", 0),
        ("1,-1,2", 1),
        ("GPU-1234", 1),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6, 2", 2),
        ("MIG-377e0049-554c-540b-93c6-d0976f8426cb,MIG-GPU-1234/1/0", 1),
        ("NoDevFiles", 0),
    ],
)
def test_gpus_are_counted_without_torch(value: str, count: int) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": value}) == count


def test_more_ranks_than_gpus_are_refused(small_recipe: Path, cast_shards: Path) -> None:
    done = subprocess.run(
        local("--config", small_recipe, "--data", cast_shards, "--ranks", "4", "--dry-run"),
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "0,1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "--ranks 4, but there are 2 GPU(s)" in done.stderr
    assert "CUDA_VISIBLE_DEVICES= to train on the CPU" in done.stderr
