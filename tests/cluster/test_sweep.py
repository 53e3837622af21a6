"""A sweep on a real scheduler, submitted from a clone that is broken while its jobs wait, run and restart."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest

from crate_dist.run.folder import RunFolder, read_recipe
from tests.cluster.runs import ONE_THREAD, Arguments, check_finished, rank_process, starts, wait_for_step
from tests.cluster.testbed import Cluster
from tests.ranks import REPOSITORY

pytestmark = pytest.mark.slurm

STEPS = 60


def test_a_sweep_trains_the_code_that_it_was_submitted_with(
    cluster: Cluster, small_recipe: Path, cast_shards: Path, tmp_path: Path
) -> None:
    clone, sweep = tmp_path / "clone", tmp_path / "sweep"
    for folder in ("crate_dist", "configs", "launch"):
        shutil.copytree(REPOSITORY / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__"))
    steps = ["--set", "train.epochs=40", "--set", f"train.max_steps={STEPS}", "--set", "log.eval_every_epochs=40"]
    grid = ["--grid", "optim.lr=1e-4,3e-4", "--grid", "train.seed=0,1"]
    shape = ["--nodes", "1", "--gpus-per-node", "0", "--tasks-per-node", "1", "--cpus-per-task", "2", "--time", "10"]
    setup = [word for line in cluster.setup_lines for word in ("--setup", line)]
    command: Arguments = [sys.executable, clone / "launch" / "slurm.py", "--config", small_recipe, *setup]
    command += ["--data", cast_shards, "--run-dir", sweep, *steps, *shape, "--sbatch", "hold"]
    said = cluster.run([*command, *grid], env=ONE_THREAD, cwd=clone).stdout
    names = ["lr=0.0001,seed=0", "lr=0.0001,seed=1", "lr=0.0003,seed=0", "lr=0.0003,seed=1"]
    rows = re.findall(r"^(lr=\S+) +(\S+) +(\d) +job (\S+)$", said, re.MULTILINE)
    assert [(name, f"lr={lr},seed={seed}") for name, lr, seed, _ in rows] == [(name, name) for name in names]
    jobs = {name: job for name, _, _, job in rows}
    array = jobs[names[0]].partition("_")[0]

    for path in ("__init__.py", "job.py", "train.py", "data/workers.py"):
        (clone / "crate_dist" / path).write_text("raise SystemExit('edited while the job waited')\n")
    cluster.run(["scontrol", "release", array])
    runs = {name: sweep / name for name in names}
    for name in names[:2]:
        wait_for_step(runs[name], 10)
    os.kill(rank_process(jobs[names[0]], 0), signal.SIGKILL)
    cluster.run(["scancel", "--signal=USR2", jobs[names[1]]])
    for name in names:
        cluster.wait_for(jobs[name], "COMPLETED", restarts=int(name == names[1]), timeout_s=240)

    (snapshot,) = (path.name for path in (sweep / "code").iterdir())
    for name in names:
        again = name in names[:2]
        check_finished(runs[name], ranks=1, launcher="slurm", last_step=STEPS, starts=1 + again)
        assert {start["snapshot"] for start in starts(runs[name])} == {snapshot}
        recipe = read_recipe(runs[name])
        assert name == f"lr={recipe.optim.lr},seed={recipe.train.seed}"
        assert "edited" not in "".join(path.read_text() for path in RunFolder(runs[name]).logs.iterdir())

    # The sweep is a file: what is complete is left alone, and a value that is added is what there is to do.
    file = sweep / "grid.toml"
    command = [sys.executable, REPOSITORY / "launch" / "slurm.py", "--grid-file", file]
    assert cluster.run(command).stdout.endswith("nothing is left to do\n")
    file.write_text(file.read_text().replace("[0, 1]", "[0, 1, 2]"))
    said = cluster.run([*command, "--dry-run"]).stdout
    states = dict(re.findall(r"^(lr=\S+) .* (complete at step|new)", said, re.MULTILINE))
    added = ["lr=0.0001,seed=2", "lr=0.0003,seed=2"]
    assert states == dict.fromkeys(names, "complete at step") | dict.fromkeys(added, "new")
    assert "#SBATCH --array=0-1%2" in said
