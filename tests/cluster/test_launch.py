"""Whole runs on a real scheduler: submitted by launch/slurm.py, and as ranks of a plain srun."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from crate_dist.run.folder import read_recipe
from tests.cluster.runs import ONE_THREAD, Arguments, check_finished, starts, submit, wait_for_step
from tests.cluster.testbed import Cluster, wait_until
from tests.ranks import REPOSITORY

pytestmark = pytest.mark.slurm

LAST_STEP = 25


def test_a_job_on_four_nodes_trains_to_the_end_in_a_folder_whose_name_is_no_pattern(
    cluster: Cluster, small_recipe: Path, cast_shards: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "100% of %it%%" / "50%"
    run_dir.parent.mkdir()
    arguments: Arguments = ["--config", small_recipe, "--data", cast_shards, "--run-dir", run_dir]
    shape = ["--nodes", "4", "--gpus-per-node", "0", "--tasks-per-node", "1", "--cpus-per-task", "2"]
    job_id, said = submit(cluster, [*arguments, *shape], cwd=run_dir.parent)
    job = cluster.wait_for(job_id, "COMPLETED", timeout_s=240)
    assert job.nodes == "n[0-3]"
    assert f"scancel {job_id}" in said
    assert "24 = 6 images at a time x 1 accumulated x 4 ranks" in said
    log = re.search(r"tail -F '(.+)'", said)
    assert log
    assert f"step {LAST_STEP}/{LAST_STEP}" in Path(log[1]).read_text()
    check_finished(run_dir, ranks=4, launcher="slurm", last_step=LAST_STEP)
    logs = sorted(path.name for path in (run_dir / "slurm" / job_id).glob("*.out"))
    assert logs == [f"{job_id}_{rank}_log.out" for rank in range(4)]
    assert sorted(path.name for path in run_dir.parent.iterdir()) == ["50%"]


def test_tasks_of_an_array_have_nothing_to_do_with_each_other(
    cluster: Cluster, small_recipe: Path, cast_shards: Path, tmp_path: Path
) -> None:
    """The last task is the one whose SLURM_JOB_ID is the whole array's; the path is no pattern of SLURM's."""
    runs = tmp_path / "50%off"
    arguments: Arguments = [
        "--config",
        small_recipe,
        "--data",
        f"pipe:cat {cast_shards}/{{}}",
        "--set",
        f"data.cache_dir={tmp_path / 'cache'}",
        "--run-dir",
        runs,
        "--seeds",
        "3",
        "4",
        "5",
    ]
    arguments += ["--set", "train.epochs=40", "--set", "log.eval_every_epochs=40", "--set", "train.max_steps=300"]
    arguments += ["--set", "train.precision=fp32"]  # a third of the time on a CPU
    shape = ["--nodes", "1", "--gpus-per-node", "0", "--tasks-per-node", "1", "--cpus-per-task", "2"]
    job_id, _ = submit(cluster, [*arguments, *shape], cwd=tmp_path)
    array = job_id.partition("_")[0]
    run_dirs = [runs / f"seed{seed}" for seed in (3, 4, 5)]
    for run_dir in run_dirs:
        wait_for_step(run_dir, 10)

    cluster.run(["scancel", "--signal=TERM", f"{array}_2"])
    cluster.wait_for(f"{array}_2", "RUNNING", restarts=1)
    wait_until(lambda: len(starts(run_dirs[2])) == 2, "second start")
    assert [cluster.job(f"{array}_{task}").restarts for task in (0, 1)] == [0, 0]
    cluster.run(["scancel", f"{array}_2"])

    for task, seed in enumerate((3, 4)):
        name, run_dir = f"{array}_{task}", run_dirs[task]
        assert cluster.wait_for(name, "COMPLETED", timeout_s=240).restarts == 0
        check_finished(run_dir, ranks=1, launcher="slurm", last_step=300)
        assert read_recipe(run_dir).train.seed == seed
        assert "step 300/" in (run_dir / "slurm" / name / f"{name}_0_log.out").read_text()
    cancelled = cluster.job(f"{array}_2")
    assert (cancelled.state, cancelled.restarts) == ("CANCELLED", 1)


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
    check_finished(tmp_path / "run", ranks=4, launcher="slurm", last_step=LAST_STEP)


def test_a_refusal_by_sbatch_is_shown(cluster: Cluster, small_recipe: Path, cast_shards: Path, tmp_path: Path) -> None:
    arguments: Arguments = ["--config", small_recipe, "--data", cast_shards, "--run-dir", tmp_path / "run"]
    command: Arguments = [sys.executable, REPOSITORY / "launch" / "slurm.py", *arguments, "--gpus-per-node", "0"]
    done = cluster.run([*command, "--partition", "nowhere"], check=False)
    assert done.returncode == 1
    assert "invalid partition specified: nowhere" in done.stderr
    assert "error: sbatch refused the job" in done.stderr
    assert "Traceback" not in done.stderr
