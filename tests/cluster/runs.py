"""A training run as a job of the cluster: submitting it, following it, reading back what it has left."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from crate_dist.run.folder import RunFolder
from crate_dist.run.ledger import Ledger, LedgerTotals
from tests.cluster import places
from tests.cluster.testbed import Cluster, wait_until
from tests.ranks import REPOSITORY

# The nodes share the cores of one machine.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
Arguments = list[str | Path]


def submit(cluster: Cluster, arguments: Arguments, cwd: Path) -> tuple[str, str]:
    """Runs launch/slurm.py on the login node; the job id, and all that it printed."""
    setup = [word for line in cluster.setup_lines for word in ("--setup", line)]
    command: Arguments = [sys.executable, REPOSITORY / "launch" / "slurm.py", *arguments, "--time", "10", *setup]
    said = cluster.run(command, env=ONE_THREAD, cwd=cwd).stdout
    job = re.search(r"^job +(\S+)$", said, re.MULTILINE)
    assert job, said
    return job[1], said


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """Every step that metrics.jsonl has a training loss for, and the loss, as they stand there."""
    text = RunFolder(run_dir).metrics.read_text()
    lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]  # the last may be half written
    return [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]


def steps(run_dir: Path) -> list[int]:
    """The steps alone."""
    return [step for step, _ in losses(run_dir)]


def wait_for_step(run_dir: Path, step: int, timeout_s: float = 120) -> None:
    """Waits until the run has come so far."""

    def there() -> bool:
        return RunFolder(run_dir).metrics.exists() and max(steps(run_dir), default=0) >= step

    wait_until(there, f"step {step}", timeout_s)


def starts(run_dir: Path) -> list[dict[str, Any]]:
    """Reads what run.json has noted of each start."""
    record: dict[str, Any] = json.loads(RunFolder(run_dir).record_file.read_text())
    return list(record["starts"])


def totals(run_dir: Path) -> LedgerTotals:
    """The sums of the run's ledger."""
    return Ledger(RunFolder(run_dir).ledger).totals


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """The weights that the finished run has exported, by name."""
    exported: dict[str, torch.Tensor] = torch.load(RunFolder(run_dir).model("last"), weights_only=True)["state_dict"]
    return exported


def check_finished(run_dir: Path, ranks: int, launcher: str, last_step: int, starts: int = 1) -> None:
    """Reads back what a finished run has to leave."""
    folder = RunFolder(run_dir)
    assert steps(run_dir) == list(range(1, last_step + 1))
    newest = max(folder.checkpoints.iterdir())
    assert len(list(newest.glob("rank-*.pt"))) == ranks
    record = json.loads(folder.record_file.read_text())["starts"]
    assert [(start["world_size"], start["launcher"]) for start in record] == [(ranks, launcher)] * starts
    exported = torch.load(folder.model("last"), weights_only=True)
    assert exported["meta"]["step"] == last_step


def rank_process(job_id: str, rank: int) -> int:
    """The process id, as this machine sees it, of a job's rank; the processes of its loader are not meant."""
    array, _, task = job_id.partition("_")
    of_job = {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": task} if task else {"SLURM_JOB_ID": job_id}
    of_rank = {**of_job, "SLURM_PROCID": str(rank)}  # as of the batch script, which is in no step
    family = {pid for step in range(8) for pid in places.processes_with({**of_rank, "SLURM_STEP_ID": str(step)})}
    heads = [pid for pid in family if places.parent(pid) not in family]
    assert len(heads) == 1, f"rank {rank} of job {job_id}: {family}"
    return heads[0]
