"""A site file, any option of sbatch, and SLURM's verdict, on a real scheduler."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.runs import ONE_THREAD, Arguments, submit
from tests.cluster.testbed import Cluster
from tests.ranks import REPOSITORY

pytestmark = pytest.mark.slurm

ODD = """it's "two" words; $HOME `id` #x %j"""
ON_CPU = ["--gpus-per-node", "0"]


@pytest.fixture
def arguments(small_recipe: Path, cast_shards: Path, tmp_path: Path) -> Arguments:
    """A run of one step, for a GPU."""
    small_recipe.write_text(
        f"{small_recipe.read_text()}\n[cluster]\ngpus_per_node = 1\ncpus_per_task = 1\ntime_min = 10\n"
    )
    run: Arguments = ["--config", small_recipe, "--data", cast_shards, "--run-dir", tmp_path / "run"]
    return [*run, "--set", "train.max_steps=1", "--set", "data.val_split="]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site file, beside which a job writes down its environment."""
    path = tmp_path / "site.toml"
    path.write_text(
        f"""
        partition = "abrupt"
        exclude = ["n3"]
        setup = ["env -0 > {tmp_path}/environment"]
        environment.NCCL_DEBUG = '''{ODD}'''
        sbatch.comment = '''{ODD}'''
        sbatch.nice = 3
        """
    )
    return path


def test_a_job_gets_what_the_site_file_and_the_flags_say(cluster: Cluster, arguments: Arguments, site: Path) -> None:
    more = ["--exclude", "n[1-2]", "--sbatch", "nice=7", "--sbatch", "switches=1"]
    job_id, said = submit(cluster, [*arguments, *ON_CPU, "--site", site, *more], cwd=site.parent)
    assert re.search(r"^starts +\d{4}-\d\d-\d\d \S+ on n0 of partition abrupt", said, re.MULTILINE)
    job = cluster.wait_for(job_id, "COMPLETED", timeout_s=240)
    assert (job.nodes, cluster.excluded(job_id)) == ("n0", {"n1", "n2", "n3"})
    shown = cluster.run(["scontrol", "show", "job", job_id]).stdout
    assert "Partition=abrupt" in shown
    assert f"Comment={ODD}" in shown
    assert " Nice=7 " in shown
    assert f"NCCL_DEBUG={ODD}" in (site.parent / "environment").read_text().split("\0")


def launch(
    cluster: Cluster, arguments: Arguments, *more: str | Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command: Arguments = [sys.executable, REPOSITORY / "launch" / "slurm.py", *arguments, *more]
    return cluster.run(command, check=False, env={**ONE_THREAD, **(env or {})})


def test_slurm_says_what_it_would_do_and_nothing_is_queued(
    cluster: Cluster, arguments: Arguments, tmp_path: Path
) -> None:
    elsewhere = {"SBATCH_PARTITION": "nowhere", "SBATCH_TIMELIMIT": "900"}
    flags = ["--sbatch", "gres=gpu:4", "--partition", "high", "--cpus-per-task", "2"]
    shown = launch(cluster, arguments, *flags, "--dry-run", env=elsewhere)
    assert shown.stdout.startswith("verdict       yes: SLURM would take it, and start it at 2")
    assert re.search(r" on n\d of partition high, by what is queued now$", shown.stdout.splitlines()[0])
    assert {"$SBATCH_PARTITION", "$SBATCH_TIMELIMIT"} <= set(shown.stdout.split())
    asked = launch(cluster, arguments, *flags, "--test-only", env=elsewhere)
    assert (asked.returncode, asked.stderr, len(asked.stdout.splitlines())) == (0, "", 1)
    assert not (tmp_path / "run").exists()
    assert not cluster.run(["squeue", "--noheader"]).stdout


def test_a_refusal_names_the_setting_and_where_it_came_from(
    cluster: Cluster, arguments: Arguments, tmp_path: Path
) -> None:
    site = tmp_path / "site.toml"
    for says, flags, *expected in (
        ('partition = "nowhere"', [], "invalid partition specified: nowhere", f"partition = nowhere, from {site}"),
        ("", ["--constraint", "h100"], "Invalid feature specification", "constraint = h100, from --constraint"),
        ("sbatch.reservation = 'x'", [], "reservation is invalid", f"reservation = x, from {site}"),
        ('gres = "gpu:8"', [], "Requested node configuration is not available", f"gpus_per_node = 8, from {site}"),
        (
            "",
            ["--gpus-per-node", "a100:2"],
            "configuration is not available",
            "gpus_per_node = a100:2, from --gpus-per-",
            "%c %m %G",
            "cores on each node",
        ),
        ('gres = "gpu:{n}"', ["--exclude", "n9"], "Invalid node name", "exclude = n9, from --exclude"),
        ("", ["--sbatch", "mail-type=x"], "Invalid --mail-type", "mail-type = x, from --sbatch mail-type=x"),
        (
            "",
            ["--nodes", "9"],
            "partition main gives a job 4 nodes at most, not 9, from --nodes (--nodes 4 would do): the job would wait",
        ),
        (
            "time = '2:00:00'",
            [],
            f"partition main ends jobs after 01:00:00, not 02:00:00, from {site} (--time 01:00:00 would",
        ),
    ):
        site.write_text(says)
        done = launch(cluster, arguments, "--site", site, *flags)
        assert done.returncode == 1, done.stdout
        for text in ("error: ", *expected):
            assert text in done.stderr
        assert "Traceback" not in done.stderr
    assert not cluster.run(["squeue", "--noheader"]).stdout
