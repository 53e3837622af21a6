"""The exit status of a rank under SLURM says whether its job is worth being started again."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crate_dist.config import load_recipe
from crate_dist.run.exit_status import NEEDS_A_PERSON, STOPPED, TRY_AGAIN
from crate_dist.run.folder import RunFolder
from tests.ranks import REPOSITORY, free_port, lock_is_free, rank_environment

pytestmark = pytest.mark.spawn


def start(run_dir: Path, world_size: int, before: str = "") -> list[subprocess.Popen[str]]:
    """The ranks of a job, as srun would start them; `before` is run in each of them first."""
    program = f"{before}\nfrom crate_dist.job import TrainJob; TrainJob({str(run_dir)!r})()"
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=REPOSITORY,
            env={**os.environ, "SLURMD_NODENAME": "n7", **rank_environment(rank, world_size, port)},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            stderr=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(world_size)
    ]


def test_a_rank_that_loses_another_one_asks_to_be_started_again(
    small_recipe: Path, cast_shards: Path, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open(load_recipe(small_recipe, data__root=cast_shards, train__epochs=100))
    first, second = start(folder.path, world_size=2)
    deadline = time.monotonic() + 120
    while not (folder.metrics.exists() and folder.metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    second.kill()
    _, said = first.communicate(timeout=60)
    assert first.returncode == TRY_AGAIN, said
    assert "this rank has lost another one" in said
    assert lock_is_free(folder)


def test_a_rank_that_cannot_work_asks_for_a_person(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (only,) = start(tmp_path / "run", world_size=1)
    _, said = only.communicate(timeout=60)
    assert only.returncode == NEEDS_A_PERSON
    assert f"{tmp_path / 'run'} is no run folder" in said
    assert "Traceback" not in said


READ_FAILS = """
import errno, os
read, reads = os.pread, []
def pread(descriptor, size, offset):
    reads.append(size)
    if len(reads) > 100:
        raise OSError(errno.{}, os.strerror(errno.{}))
    return read(descriptor, size, offset)
os.pread = pread
"""


@pytest.mark.parametrize(("number", "status"), [("EIO", TRY_AGAIN), ("EACCES", NEEDS_A_PERSON)])
def test_a_shard_that_cannot_be_read_is_tried_again_if_its_file_system_may_recover(
    number: str, status: int, small_recipe: Path, cast_shards: Path, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open(load_recipe(small_recipe, data__root=cast_shards))
    (only,) = start(folder.path, world_size=1, before=READ_FAILS.format(number, number))
    said, errors = only.communicate(timeout=120)
    assert only.returncode == status, errors
    assert said.startswith("crate-dist start 0.1: rank 0 on node n7\n")
    reason = os.strerror(getattr(errno, number))
    assert "crate-dist fault: rank 0 on node n7: ShardError: cannot read " in said
    assert said.rstrip().endswith(f".tar: {reason}")
    assert "Traceback" not in errors


def test_a_loader_worker_that_is_killed_is_a_reason_to_try_again(
    small_recipe: Path, cast_shards: Path, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open(load_recipe(small_recipe, data__root=cast_shards))
    killed = READ_FAILS.replace("raise OSError", "os.kill(os.getpid(), 9); raise OSError").format("EIO", "EIO")
    (only,) = start(folder.path, world_size=1, before=killed)
    said, errors = only.communicate(timeout=120)
    assert only.returncode == TRY_AGAIN, errors
    assert "crate-dist fault: rank 0 on node n7: LostWorker: DataLoader worker (pid" in said


def test_a_rank_that_cuda_fails_asks_the_driver_whether_its_node_is_to_be_left(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\ncase $1 in --query-gpu=*) echo 00000000:3B:00.0, 4 ;; esac\n")
    program.chmod(0o755)
    before = f"""
import os
import crate_dist.train
from crate_dist.doctor import start
os.environ["PATH"] = "{tmp_path}:" + os.environ["PATH"]
start.look_before_start = lambda *_: None
def fail(*given, **named):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
crate_dist.train.train = fail
"""
    (only,) = start(tmp_path / "run", world_size=1, before=before)
    said, errors = only.communicate(timeout=60)
    assert only.returncode == TRY_AGAIN, errors
    assert "crate-dist fault: rank 0 on node n7: RuntimeError: CUDA error: an illegal memory access" in said
    assert "crate-dist unfit: rank 0 on node n7: GPU 00000000:3B:00.0: 4 errors in its memory that were not" in said


def test_a_signal_before_the_training_has_begun_is_a_stop_and_no_fault(tmp_path: Path) -> None:
    early = """
import builtins, os, signal
importing = builtins.__import__
def signalled(name, *rest):
    if name == "torch":
        os.kill(os.getpid(), signal.SIGUSR2)
    return importing(name, *rest)
builtins.__import__ = signalled
"""
    (only,) = start(tmp_path / "run", world_size=1, before=early)
    assert only.wait(timeout=60) == STOPPED
