"""Whole runs that meet in one folder: one of them writes, and what it has written stays."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from crate_dist.checkpoint.loading import list_checkpoints
from crate_dist.run.exit_status import LOST_THE_RUN
from crate_dist.run.folder import RunFolder, read_recipe
from tests.cluster.runs import steps
from tests.launching.test_ranks import launched, lines, local, wait_until
from tests.ranks import REPOSITORY, lock_is_free, rank_environment

pytestmark = pytest.mark.spawn

NEEDS_NAMESPACES = pytest.mark.skipif(
    os.getuid() != 0 or not shutil.which("unshare"), reason="needs root and unshare, for another process namespace"
)
ENDLESS = ("train.epochs=1000", "log.eval_every_epochs=1000", "safety.lease_s=2")


@contextmanager
def training(recipe: Path, shards: Path, run_dir: Path, log: Path, *around: str) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m crate_dist.train` in one process, which sees no other's that `around` hides from it."""
    settings = [word for text in ENDLESS for word in ("--set", text)]
    command = [sys.executable, "-m", "crate_dist.train", "--config", recipe, "--data", shards, "--run-dir", run_dir]
    # What earlier tests have joined in this process would be joined again, at the same port.
    alone = {name: value for name, value in os.environ.items() if name not in rank_environment(0, 1, 0)}
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*around, *map(str, command), *settings],
            cwd=REPOSITORY,
            env={**alone, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=file,
            process_group=0,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended, and its loader's workers with it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def newest(run_dir: Path) -> int:
    """The newest step that is published."""
    saved = list_checkpoints(RunFolder(run_dir).checkpoints)
    return saved[-1].step if saved else 0


@NEEDS_NAMESPACES
def test_a_job_that_was_stopped_ends_and_leaves_its_successors_checkpoints_alone(
    small_recipe: Path, cast_shards: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    hidden = "unshare", "--pid", "--fork", "--mount-proc", "--kill-child"
    with training(small_recipe, cast_shards, run_dir, tmp_path / "first") as first:
        wait_until(lambda: newest(run_dir) >= 10, "tenth step")
        os.killpg(first.pid, signal.SIGSTOP)
        stopped_at = newest(run_dir)
        with training(small_recipe, cast_shards, run_dir, tmp_path / "second", *hidden) as second:
            wait_until(lambda: newest(run_dir) >= stopped_at + 40 or second.poll() is not None, "the second far ahead")
            assert second.poll() is None, (tmp_path / "second").read_text()
            os.killpg(first.pid, signal.SIGCONT)
            assert first.wait(20) == LOST_THE_RUN, (tmp_path / "first").read_text()
            before = newest(run_dir)
            assert before >= stopped_at + 40
            wait_until(lambda: newest(run_dir) > before, "the second to go on")
            assert second.poll() is None
    assert "taken over by" in (tmp_path / "first").read_text()
    made = steps(run_dir)
    assert made == list(range(1, made[-1] + 1))
    assert not lock_is_free(RunFolder(run_dir))  # its holder was killed


def test_a_second_start_is_refused_before_anything_is_launched_and_changes_nothing(
    small_recipe: Path, cast_shards: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with launched(small_recipe, cast_shards, run_dir, "--set", "train.epochs=1000") as launcher:
        wait_until(lambda: lines(run_dir) >= 2, "second step")
        recipe, log = RunFolder(run_dir).recipe_file.read_text(), RunFolder(run_dir).log_file(0)
        given = "--config", small_recipe, "--data", cast_shards, "--run-dir", run_dir, "--ranks", "2"
        for more in (("--set", "train.max_steps=3"), ("--start-over",)):
            began = time.monotonic()
            command = local(*given, "--set", "train.epochs=1000", *more)
            second = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert second.returncode == 1
            assert f"error: {run_dir} is in use by process" in second.stderr
            assert time.monotonic() - began < 15
            assert str(log) not in second.stdout + second.stderr
            assert "to watch" not in second.stdout
        assert RunFolder(run_dir).recipe_file.read_text() == recipe
        before = lines(run_dir)
        wait_until(lambda: lines(run_dir) > before, "the first to go on")
        assert launcher.poll() is None
    assert not list(tmp_path.glob("run.before-*"))


def test_a_folder_whose_start_failed_before_the_first_step_takes_another_recipe(
    small_recipe: Path, cast_shards: Path, tmp_path: Path
) -> None:
    run_dir, weights = tmp_path / "run", tmp_path / "weights.pt"
    weights.write_bytes(b"these are no weights")
    with launched(small_recipe, cast_shards, run_dir, "--init-from", str(weights)) as launcher:
        said, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 1, said
    assert "--init-from" in said
    with launched(small_recipe, cast_shards, run_dir, "--set", "train.max_steps=2") as launcher:
        said, _ = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, said
    assert read_recipe(run_dir).train.init_from is None
    assert steps(run_dir) == [1, 2]
