"""Whole runs on a real scheduler: submitted by launch/slurm.py, and as ranks of a plain srun."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from crate_dist.run import RunFolder, read_recipe
from tests.cluster.testbed import Cluster, wait_until
from tests.ranks import REPOSITORY

pytestmark = pytest.mark.slurm

# The nodes share the cores of one machine.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
LAST_STEP = 25
Arguments = list[str | Path]


def steps(run_dir: Path) -> list[int]:
    """The steps that metrics.jsonl has a training loss for, as they stand there."""
    lines = [json.loads(line) for line in RunFolder(run_dir).metrics.read_text().splitlines()]
    return [line["step"] for line in lines if "train/loss" in line]


def check_finished(run_dir: Path, ranks: int, launcher: str, last_step: int = LAST_STEP, starts: int = 1) -> None:
    """Reads back what a finished run has to leave."""
    folder = RunFolder(run_dir)
    assert steps(run_dir) == list(range(1, last_step + 1))
    newest = max(folder.checkpoints.iterdir())
    assert len(list(newest.glob("rank-*.pt"))) == ranks
    record = json.loads(folder.record_file.read_text())["starts"]
    assert [(start["world_size"], start["launcher"]) for start in record] == [(ranks, launcher)] * starts
    exported = torch.load(folder.model("last"), weights_only=True)
    assert exported["meta"]["step"] == last_step


def submit(cluster: Cluster, arguments: Arguments, cwd: Path) -> tuple[str, str]:
    """Runs launch/slurm.py on the login node; the job id, and all that it printed."""
    setup = [word for line in cluster.setup_lines for word in ("--setup", line)]
    command: Arguments = [sys.executable, REPOSITORY / "launch" / "slurm.py", *arguments, "--time", "10", *setup]
    said = cluster.run(command, env=ONE_THREAD, cwd=cwd).stdout
    job = re.search(r"^job +(\S+)$", said, re.MULTILINE)
    assert job, said
    return job[1], said


def test_a_job_on_four_nodes_trains_to_the_end(
    cluster: Cluster, small_recipe: Path, cast_shards: Path, tmp_path: Path
) -> None:
    arguments: Arguments = ["--config", small_recipe, "--data", cast_shards, "--run-dir", tmp_path / "run"]
    shape = ["--nodes", "4", "--gpus-per-node", "0", "--tasks-per-node", "1", "--cpus-per-task", "2"]
    job_id, said = submit(cluster, [*arguments, *shape], cwd=tmp_path)
    job = cluster.wait_for(job_id, "COMPLETED", timeout_s=240)
    assert job.nodes == "n[0-3]"
    assert f"scancel {job_id}" in said
    assert "24 = 6 images at a time x 1 accumulated x 4 ranks" in said
    log = re.search(r"tail -F (\S+)", said)
    assert log
    assert f"step {LAST_STEP}/{LAST_STEP}" in Path(log[1]).read_text()
    check_finished(tmp_path / "run", ranks=4, launcher="slurm")


def test_a_job_that_is_warned_of_its_end_is_requeued_and_goes_on(
    cluster: Cluster, small_recipe: Path, cast_shards: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments: Arguments = ["--config", small_recipe, "--data", cast_shards, "--run-dir", run_dir]
    arguments += ["--set", "train.epochs=12"]  # 100 steps
    shape = ["--nodes", "2", "--gpus-per-node", "0", "--tasks-per-node", "1", "--cpus-per-task", "2"]
    job_id, _ = submit(cluster, [*arguments, *shape], cwd=tmp_path)
    cluster.wait_for(job_id, "RUNNING")
    wait_until(lambda: RunFolder(run_dir).metrics.exists() and len(steps(run_dir)) > 10, "tenth step")
    cluster.run(["scancel", "--signal=USR2", job_id])  # as SLURM does before the time limit
    cluster.wait_for(job_id, "COMPLETED", restarts=1, timeout_s=240)
    check_finished(run_dir, ranks=2, launcher="slurm", last_step=100, starts=2)


def test_an_array_of_seeds_is_one_job_and_a_run_folder_each(
    cluster: Cluster, small_recipe: Path, cast_shards: Path, tmp_path: Path
) -> None:
    arguments: Arguments = [
        "--config",
        small_recipe,
        "--data",
        cast_shards,
        "--run-dir",
        tmp_path / "runs",
        "--seeds",
        "3",
        "4",
    ]
    shape = ["--nodes", "1", "--gpus-per-node", "0", "--tasks-per-node", "1", "--cpus-per-task", "2"]
    job_id, _ = submit(cluster, [*arguments, *shape], cwd=tmp_path)
    for number, seed in enumerate((3, 4)):
        name = f"{job_id.partition('_')[0]}_{number}"
        run_dir = tmp_path / "runs" / f"seed{seed}"
        cluster.wait_for(name, "COMPLETED", timeout_s=240)
        check_finished(run_dir, ranks=1, launcher="slurm")
        assert read_recipe(run_dir).train.seed == seed
        assert f"step {LAST_STEP}/{LAST_STEP}" in (run_dir / "slurm" / name / f"{name}_0_log.out").read_text()


def test_plain_srun_starts_the_same_run(
    cluster: Cluster, small_recipe: Path, cast_shards: Path, tmp_path: Path
) -> None:
    train: Arguments = [sys.executable, "-m", "crate_dist.train", "--config", small_recipe]
    environment = {**ONE_THREAD, **({} if cluster.isolated else {"MASTER_ADDR": "127.0.0.1"})}
    cluster.run(
        ["srun", "--nodes=2", "--ntasks-per-node=2", *train, "--data", cast_shards, "--run-dir", tmp_path / "run"],
        env=environment,
        timeout_s=240,
        cwd=tmp_path,
    )
    check_finished(tmp_path / "run", ranks=4, launcher="slurm")


def test_a_refusal_by_sbatch_is_shown(cluster: Cluster, small_recipe: Path, cast_shards: Path, tmp_path: Path) -> None:
    arguments: Arguments = ["--config", small_recipe, "--data", cast_shards, "--run-dir", tmp_path / "run"]
    command: Arguments = [sys.executable, REPOSITORY / "launch" / "slurm.py", *arguments, "--gpus-per-node", "0"]
    done = cluster.run([*command, "--partition", "nowhere"], check=False)
    assert done.returncode == 1
    assert "invalid partition specified: nowhere" in done.stderr
    assert "error: sbatch refused the job" in done.stderr
    assert "Traceback" not in done.stderr
