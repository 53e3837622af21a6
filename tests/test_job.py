"""The exit status of a rank under SLURM says whether its job is worth being started again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crate_dist.config import load_recipe
from crate_dist.run import RunFolder
from crate_dist.status import NEEDS_A_PERSON, TRY_AGAIN
from tests.ranks import REPOSITORY, free_port, lock_is_free, rank_environment

pytestmark = pytest.mark.spawn


def start(run_dir: Path, world_size: int) -> list[subprocess.Popen[str]]:
    """The ranks of a job, as srun would start them."""
    program = f"from crate_dist.job import TrainJob; TrainJob({str(run_dir)!r})()"
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=REPOSITORY,
            env={**os.environ, **rank_environment(rank, world_size, port)},
            stdout=subprocess.DEVNULL,
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
