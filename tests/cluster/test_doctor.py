"""Under srun every rank of the examination takes part, and rank 0 reports."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.cluster.runs import ONE_THREAD, Arguments
from tests.cluster.testbed import Cluster

pytestmark = pytest.mark.slurm


def test_nodes_are_examined_together(cluster: Cluster, tmp_path: Path) -> None:
    command: Arguments = [sys.executable, "-m", "crate_dist.doctor", "--full", "--only", "between", "--budget", "120"]
    environment = {**ONE_THREAD, **({} if cluster.isolated else {"MASTER_ADDR": "127.0.0.1"})}
    done = cluster.run(
        ["srun", "--nodes=2", "--ntasks-per-node=2", *command, "--json", tmp_path / "doctor.json"],
        env=environment,
        timeout_s=150,
        cwd=tmp_path,
    )
    (stage,) = json.loads((tmp_path / "doctor.json").read_text())["stages"]
    found = {finding["name"]: finding for finding in stage["findings"]}
    assert stage["state"] == "done"
    assert found["ranks"]["value"] == "4 alike"
    assert found["nodes"]["value"] == 2
    assert len(found["slowest link"]["facts"]["GB/s"]) == 4
    assert re.search(r"rank \d on n[01] to rank \d on n[01]$", found["slowest link"]["value"])
    assert found["clock of rank 2, to rank 0's"]["passed"]
    assert "all-reduce over 2 ranks, each link" in found
    assert "all-reduce over 4 ranks, each link" in found
    assert done.stdout.count("between: done") == 1
