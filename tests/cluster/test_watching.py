"""launch/status.py on a real scheduler: a run that waits, is cancelled, runs, is stopped, and goes on elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from crate_dist.watching.runs import EXIT_STATUS
from tests.cluster.runs import ONE_THREAD, Arguments, starts, submit, wait_for_step
from tests.cluster.testbed import Cluster, wait_until
from tests.ranks import REPOSITORY

pytestmark = pytest.mark.slurm

LAST_STEP = 200


def status(cluster: Cluster, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """launch/status.py on the login node."""
    command = [sys.executable, REPOSITORY / "launch" / "status.py", *arguments]
    return cluster.run(command, check=False, env=ONE_THREAD, timeout_s=120)


def told(cluster: Cluster, run_dir: Path) -> dict[str, Any]:
    """What it says as JSON, its exit status being that of the state."""
    done = status(cluster, run_dir, "--json")
    run: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == EXIT_STATUS[run["state"]], done.stderr
    return run


def test_a_run_is_watched_stopped_and_resumed_on_fewer_nodes(
    cluster: Cluster, small_recipe: Path, cast_shards: Path, tmp_path: Path
) -> None:
    run_dir, note = tmp_path / "run", tmp_path / "note.json"
    arguments: Arguments = ["--config", small_recipe, "--data", cast_shards, "--run-dir", run_dir]
    arguments += ["--set", "train.epochs=24", "--nodes", "2", "--gpus-per-node", "0", "--tasks-per-node", "1"]
    setup = [word for line in cluster.setup_lines for word in ("--setup", line)]
    for node in cluster.node_names:
        cluster.set_state(node, "drain")
    waiting, said = submit(cluster, [*arguments, "--cpus-per-task", "2", "--mail", "nobody"], cwd=tmp_path)
    assert f"status.py {run_dir} --watch" in said
    assert "MailUser=nobody" in cluster.run(["scontrol", "show", "job", waiting]).stdout
    wait_until(lambda: cluster.job(waiting).reason not in ("None", "(null)"), "reason for waiting")
    run = told(cluster, run_dir)
    assert (run["state"], run["job"], run["job_state"], run["step"]) == ("waiting", waiting, "PENDING", None)
    assert "down, drained or reserved" in run["why"].lower()

    assert f"job {waiting}, which waited, is cancelled" in status(cluster, "stop", run_dir, "--wait").stdout
    assert cluster.job(waiting).state == "CANCELLED"
    assert told(cluster, run_dir)["state"] == "stopped"

    for node in cluster.node_names:
        cluster.set_state(node, "resume")
    done = status(cluster, "resume", run_dir, *setup)
    assert done.returncode == 0, done.stderr
    wait_for_step(run_dir, 10)
    run = told(cluster, run_dir)
    stopped = run["job"]
    assert (run["state"], run["where"], run["world_size"]) == ("running", "n[0-1]", 2)
    assert run["last_step"] == LAST_STEP
    assert 0 < run["checkpoint_step"] <= run["step"]  # one every five steps, and one after each evaluation
    assert min(run["step"] - 9, run["images_per_s"], run["left_s"]) > 0
    assert "stop it before" in status(cluster, "resume", run_dir).stderr

    done = status(cluster, "stop", run_dir, "--wait")
    step = told(cluster, run_dir)["checkpoint_step"]
    assert f"stopped: it was asked to stop, and has saved step {step}" in done.stdout, done.stdout + done.stderr
    assert 10 <= step < LAST_STEP
    job = cluster.job(stopped)
    assert (job.state, job.restarts) == ("FAILED", 0)
    assert "crate-dist: stopped, as it was asked to" in job.log.read_text()
    assert "told to stop: saving step" in status(cluster, "logs", run_dir, "--rank", "1").stdout

    done = status(cluster, "resume", run_dir, "--nodes", "1", *setup, "--notify", f"cat > {note}; exit 3")
    assert done.returncode == 0, done.stderr
    wait_for_step(run_dir, LAST_STEP)
    wait_until(lambda: told(cluster, run_dir)["state"] == "done", "end of the run")
    wait_until(lambda: not told(cluster, run_dir)["job"], "end of the job")
    assert [start["step"] for start in starts(run_dir)] == [0, step]
    assert [start["world_size"] for start in starts(run_dir)] == [2, 1]
    event = json.loads(note.read_text())
    assert (event["event"], event["state"], event["step"], event["best_top1"] > 50) == ("done", "done", LAST_STEP, True)
    assert "the --notify command ended with 3" in status(cluster, "logs", run_dir).stdout
