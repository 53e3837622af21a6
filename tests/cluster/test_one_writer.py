"""One writer on a real cluster: a node that is cut off while its storage is not, a job that waits in the queue."""

from __future__ import annotations

from pathlib import Path

import pytest

from crate_dist.run.folder import RunFolder, read_recipe
from tests.cluster.runs import (
    Arguments,
    check_finished,
    rank_process,
    starts,
    steps,
    submit,
    wait_for_step,
    weights,
)
from tests.cluster.testbed import Cluster, ClusterError, wait_until
from tests.conftest import SMALL_RECIPE
from tests.ranks import lock_is_free

pytestmark = pytest.mark.slurm

ONE_RANK = ("--nodes", "1", "--gpus-per-node", "0", "--tasks-per-node", "1", "--cpus-per-task", "2")


@pytest.fixture
def recipe(tmp_path: Path, cast_shards: Path) -> Arguments:
    """A run that outlives what is done to it, unless it is told how long it is."""
    path = tmp_path / "long.toml"
    path.write_text(SMALL_RECIPE)
    settings = ["train.epochs=400", "log.eval_every_epochs=400", "checkpoint.every_steps=20"]
    return ["--config", path, "--data", cast_shards, *(word for text in settings for word in ("--set", text))]


@pytest.mark.slow
def test_a_job_whose_node_is_cut_off_gives_way_to_its_next_start(
    cluster: Cluster, recipe: Arguments, tmp_path: Path
) -> None:
    if not cluster.isolated:
        pytest.skip("needs nodes with a network of their own")
    run_dir = tmp_path / "run"
    job_id, _ = submit(cluster, [*recipe, "--run-dir", run_dir, *ONE_RANK], cwd=tmp_path)
    wait_for_step(run_dir, 45)
    old = rank_process(job_id, 0)
    node = cluster.job(job_id).nodes
    cluster.cut(node)
    try:
        wait_until(lambda: len(starts(run_dir)) == 2, "start on another node", timeout_s=180)
        assert not Path(f"/proc/{old}").exists(), "two train at a time"
        begun_at = starts(run_dir)[1]["step"]
        wait_for_step(run_dir, begun_at + 60)
    finally:
        cluster.heal(node)
    job = cluster.job(job_id)
    assert (job.state, job.restarts) == ("RUNNING", 1), "the one that gave way had it started once more"
    assert job.nodes != node
    assert "SLURM has started job" in RunFolder(run_dir).log_file(0).read_text()
    cluster.run(["scancel", "--signal=KILL", job_id], check=False)
    made = steps(run_dir)
    assert made == list(range(1, made[-1] + 1))


def test_while_a_job_waits_in_the_queue_its_folder_takes_no_other_start(
    cluster: Cluster, recipe: Arguments, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    short = [*recipe, "--run-dir", run_dir, *ONE_RANK, "--set", "train.max_steps=3"]
    for node in cluster.node_names:
        cluster.set_state(node, "drain")
    job_id, _ = submit(cluster, short, cwd=tmp_path)
    before = read_recipe(run_dir)
    with pytest.raises(ClusterError, match=rf"job {job_id}, which is to work in .*, is pending"):
        submit(cluster, [*short, "--set", "data.workers=0"], cwd=tmp_path)
    assert read_recipe(run_dir) == before
    for node in cluster.node_names:
        cluster.set_state(node, "resume")
    cluster.wait_for(job_id, "COMPLETED")
    check_finished(run_dir, ranks=1, launcher="slurm", last_step=3)
    assert lock_is_free(RunFolder(run_dir))
    assert weights(run_dir)


def test_a_folder_whose_job_was_refused_takes_another_recipe(
    cluster: Cluster, recipe: Arguments, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    given = [*recipe, "--run-dir", run_dir, *ONE_RANK]
    with pytest.raises(ClusterError, match="sbatch refused the job"):
        submit(cluster, [*given, "--partition", "nowhere"], cwd=tmp_path)
    job_id, _ = submit(cluster, [*given, "--set", "optim.lr=1e-4"], cwd=tmp_path)
    assert read_recipe(run_dir).optim.lr == 1e-4
    cluster.run(["scancel", job_id])
