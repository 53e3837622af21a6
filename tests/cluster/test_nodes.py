"""A job that leaves the number of its nodes to SLURM trains on those that divide, and leaves one that is unfit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.runs import Arguments, losses, starts, steps, submit, totals, wait_for_step
from tests.cluster.testbed import Cluster, wait_until
from tests.conftest import SMALL_RECIPE
from tests.ranks import Training

pytestmark = pytest.mark.slurm

LAST_STEP = 150
WRONG_CLOCK = """
import os, pathlib, time
if os.environ.get("SLURMD_NODENAME") == "n1" and pathlib.Path({flag!r}).exists():
    right = time.time
    time.time = lambda: right() + 86400
"""


def test_a_run_takes_the_nodes_that_it_gets_and_leaves_one_that_fails_its_examination(
    cluster: Cluster, cast_shards: Path, tmp_path: Path
) -> None:
    """Two nodes are free; after a requeue four, of which three divide the batch of 18, and one has a wrong clock."""
    recipe, run_dir, flag, first = tmp_path / "long.toml", tmp_path / "run", tmp_path / "wrong", tmp_path / "first"
    recipe.write_text(SMALL_RECIPE)
    first.mkdir()
    (first / "sitecustomize.py").write_text(WRONG_CLOCK.format(flag=str(flag)))
    settings = ["train.global_batch=18", "train.epochs=90", f"train.max_steps={LAST_STEP}", "data.val_split="]
    settings += ["checkpoint.every_steps=20"]
    run: Arguments = ["--config", recipe, "--data", cast_shards, *(w for text in settings for w in ("--set", text))]
    job: Arguments = ["--nodes", "2-4", "--gpus-per-node", "0", "--tasks-per-node", "1", "--cpus-per-task", "2"]
    for node in ("n2", "n3"):
        cluster.set_state(node, "drain")
    with Training([*run, "--run-dir", tmp_path / "undisturbed"], world_size=2) as undisturbed:
        setup = ["--setup", f"export PYTHONPATH={first}"]
        job_id, said = submit(cluster, [*run, "--run-dir", run_dir, *job, *setup], cwd=tmp_path)
        assert "2 and 3 of 2-4 nodes; on 4, 1 would stand idle" in said
        wait_for_step(run_dir, 30)
        flag.touch()
        for node in ("n2", "n3"):
            cluster.set_state(node, "resume")
        cluster.run(["scancel", "--signal=TERM", job_id])
        wait_until(lambda: len(starts(run_dir)) == 2, "second start")
        wait_for_step(run_dir, starts(run_dir)[1]["step"] + 30)
        assert cluster.excluded(job_id) == set()
        cluster.run(["scancel", "--signal=TERM", job_id])
        done = cluster.wait_for(job_id, "COMPLETED", restarts=2, timeout_s=240)
        assert undisturbed.wait() == [0, 0]
    assert cluster.excluded(job_id) == {"n1"}
    log = done.log.read_text()
    assert "the global batch divides over 3 nodes, and not over 4; idle: n3" in log
    assert "node n1 is unfit: rank 1 on node n1: clock, to that of the file system: -86,400" in log
    assert "starting the ranks again on the same nodes without n1 (1 of at most 3 times)" in log
    assert "node n1 is excluded from now on (in all: n1)" in log
    assert [start["world_size"] for start in starts(run_dir)] == [2, 3, 3]
    assert steps(run_dir) == list(range(1, LAST_STEP + 1))
    assert totals(run_dir).steps_redone == 0
    # The same batches, summed up in another order and in bf16.
    there = dict(losses(tmp_path / "undisturbed"))
    assert max(abs(loss - there[step]) for step, loss in losses(run_dir)) < 0.1
