"""The cluster behaves as real ones do, so that what passes on it means something."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.testbed import Cluster, ClusterError, wait_until

pytestmark = pytest.mark.slurm


def test_nodes_are_machines_of_their_own(cluster: Cluster) -> None:
    if not cluster.isolated:
        pytest.skip("namespaces cannot be made here: the nodes share the machine's network")
    told = cluster.run(["srun", "--nodes=4", "--label", "sh", "-c", "hostname; hostname --ip-address"]).stdout
    assert sorted(told.split("\n")[:-1]) == sorted(
        line for n in range(4) for line in (f"{n}: n{n}", f"{n}: 10.77.0.{10 + n}")
    )
    with pytest.raises(ClusterError, match="Connection refused"):  # a rendezvous at 127.0.0.1 must not work
        cluster.run(["srun", "--nodes=1", "bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/16819"])


def test_a_job_survives_its_node(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = "srun bash -c 'echo started on $SLURMD_NODENAME; while echo tick >> ticks; do sleep 0.2; done'"
    job_id = cluster.run(
        ["sbatch", "--parsable", "--requeue", "--nodes=2", "--open-mode=append", f"--output={log}", "--wrap", script],
        cwd=tmp_path,
    ).stdout.strip()
    assert cluster.wait_for(job_id, "RUNNING").nodes == "n[0-1]"
    wait_until(lambda: log.exists() and log.read_text().count("started") == 2, "first start", timeout_s=30)
    cluster.crash("n0")
    cluster.set_state("n0", "down")  # an administrator is quicker than SLURM's own time-out
    wait_until(lambda: log.read_text().count("started") == 4, "second start", timeout_s=60)
    job = cluster.wait_for(job_id, "RUNNING", restarts=1)
    assert job.nodes == "n[1-2]"
    cluster.recover()
    assert cluster.job(job_id).state == "CANCELLED"
    ticks = (tmp_path / "ticks").stat().st_size
    assert cluster.run(["srun", "--nodes=4", "sleep", "0.5"]).returncode == 0
    assert (tmp_path / "ticks").stat().st_size == ticks  # nothing lives on, on no node


def test_an_unexpected_end_shows_the_log_of_the_job(cluster: Cluster, tmp_path: Path) -> None:
    wrapped = ["sbatch", "--parsable", f"--output={tmp_path}/log", "--wrap", "echo no such thing; exit 3"]
    job_id = cluster.run(wrapped).stdout.strip()
    with pytest.raises(ClusterError, match=r"(?s)expected COMPLETED.*state='FAILED'.*exit_code='3:0'.*no such thing"):
        cluster.wait_for(job_id, "COMPLETED", timeout_s=30)
