"""What SLURM's queue says."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass

from crate_dist.errors import UserError

_PAUSES_S = (0.0, 2.0, 6.0)  # before a scheduler that is busy is asked again


class NoAnswer(UserError):
    """SLURM did not answer; the message is what it, or the system, said instead."""


@dataclass(frozen=True)
class QueuedJob:
    """A job that waits or runs; of an array, one task."""

    number: str
    """Its own, which for a task of an array is in no other command's output."""
    name: str
    """As people write it: 12, or 12_3 for a task of an array."""
    state: str
    reason: str
    """Why it waits."""


def my_jobs() -> list[QueuedJob]:
    """Lists the user's jobs that wait or run. Raises NoAnswer."""
    asked = ["squeue", "--noheader", "--me", "--array", "--format=%A %i %T %r"]
    said = ""
    for pause_s in _PAUSES_S:
        time.sleep(pause_s)
        try:
            done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            said = str(error)
            continue
        if done.returncode == 0:
            return [QueuedJob(*line.split(maxsplit=3)) for line in done.stdout.splitlines()]
        said = done.stderr.strip()
    raise NoAnswer(said)
