"""What SLURM's queue says, and why a job waits, in words."""

from __future__ import annotations

import datetime
import re
import shutil
import subprocess
import time
from dataclasses import dataclass

from crate_dist.errors import UserError

_PAUSES_S = (0.0, 2.0, 6.0)  # before a scheduler that is busy is asked again
_TIMEOUT_S = 60.0
_IMPATIENT_S = 15.0
_FIELDS = "%A|%i|%T|%M|%L|%S|%N|%r|%o"
_REASONS = {
    "Priority": "jobs of higher priority are before it",
    "Resources": "it is next, and waits for nodes to become free",
    "Dependency": "it waits for another job to end",
    "DependencyNeverSatisfied": "the job that it waits for has failed: it will never start; scancel it",
    "BeginTime": "it was requeued or put off, and may start in a moment",
    "JobHeldUser": "it is held by its user: `scontrol release` lets it go",
    "JobHeldAdmin": "an administrator holds it",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is inactive",
    "PartitionNodeLimit": "it asks for more nodes than the partition allows: it will never start",
    "PartitionTimeLimit": "it asks for more time than the partition allows: it will never start",
    "ReqNodeNotAvail": "nodes that it needs are down, drained or reserved",
    "NodeDown": "a node that it needs is down",
    "Reservation": "it waits for its reservation to begin",
    "Licenses": "it waits for a license",
    "InvalidAccount": "its account is not valid",
    "InvalidQOS": "its quality of service is not valid",
    "BadConstraints": "no node has what it asks for",
    "JobArrayTaskLimit": "as many tasks of its array run as it allows",
    "launch failed requeued held": "it could not be started and is held: `scontrol release` lets it go",
    "None": "SLURM has not looked at it yet",
}
"""SLURM's names of reasons; those of limits (QOSMaxGRESPerUser, AssocGrpCPUMinutesLimit, …) are told apart by parts."""


class NoAnswer(UserError):
    """SLURM did not answer; the message is what it, or the system, said instead."""


@dataclass(frozen=True)
class QueuedJob:
    """A job that waits or runs; of an array, one task. What SLURM does not say is ""."""

    number: str
    """Its own, which for a task of an array is in no other command's output."""
    name: str
    """As people write it: 12, or 12_3 for a task of an array."""
    state: str
    """SLURM's word: PENDING, RUNNING, COMPLETING, …"""
    ran: str = ""
    """How long it has run, as SLURM writes it: 1-02:03:04."""
    left: str = ""
    """How much of its time limit is left, in the same way."""
    starts: str = ""
    """When it started, or is expected to: 2026-11-22T03:00:00, or N/A."""
    nodes: str = ""
    reason: str = ""
    """Why it waits, in SLURM's word."""
    script: str = ""
    """The batch script that was submitted."""

    @property
    def runs(self) -> bool:
        """Tells whether its processes are there, or may be."""
        return self.state in ("RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED")

    @property
    def started_at(self) -> float | None:
        """Seconds since 1970; of one that waits, those of its expected start."""
        try:
            return datetime.datetime.fromisoformat(self.starts).timestamp()
        except ValueError:  # N/A
            return None

    @property
    def why(self) -> str:
        """Says in words why it waits, and until when as far as SLURM expects."""
        return self._why() + (f"; SLURM expects it to start {self.starts.replace('T', ' ')}" if self.started_at else "")

    def _why(self) -> str:
        word = self.reason.partition(",")[0].strip("()")
        if word in _REASONS:
            return f"{_REASONS[word]} ({self.reason})"
        for kind, whose in (("QOS", "quality of service"), ("Assoc", "account")):
            if word.startswith(kind):
                return f"a limit of its {whose} is reached ({self.reason})"
        return self.reason


def my_jobs(patiently: bool = True) -> list[QueuedJob]:
    """Lists the user's jobs that wait or run; asks several times, when patiently. Raises NoAnswer."""
    asked = ["squeue", "--noheader", "--me", "--array", f"--format={_FIELDS}"]
    said, timeout_s = "", _TIMEOUT_S if patiently else _IMPATIENT_S
    for pause_s in _PAUSES_S if patiently else (0.0,):
        time.sleep(pause_s)
        try:
            done = subprocess.run(asked, capture_output=True, text=True, timeout=timeout_s)
        except (OSError, subprocess.TimeoutExpired) as error:
            said = str(error)
            continue
        if done.returncode == 0:
            return [QueuedJob(*line.split("|", maxsplit=8)) for line in done.stdout.splitlines()]
        said = done.stderr.strip()
    raise NoAnswer(said)


def largest_array() -> int | None:
    """Asks how many tasks an array may have; None where SLURM does not say."""
    try:
        said = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=_TIMEOUT_S).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", said, re.MULTILINE)
    return int(found[1]) if found else None


def is_here() -> bool:
    """Tells whether this machine has SLURM's programs."""
    return shutil.which("squeue") is not None
