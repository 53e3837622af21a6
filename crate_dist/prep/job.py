"""The task of an array of SLURM jobs that converts one part: what submitit pickles and calls on a node."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence

from submitit.helpers import DelayedSubmission


class PrepJob:
    """One part of a conversion; its state is in the journals, so every start continues.

    command: the converter's, as a person would give it
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)

    def __call__(self) -> None:
        """Converts, and ends the process with the converter's status unless that is 0."""
        # The warning before the time limit reaches all processes of the job, and is for submitit alone.
        ignored = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        with subprocess.Popen(self.command) as process:
            signal.signal(signal.SIGUSR2, ignored)
            try:
                status = process.wait()
            except BaseException:  # submitit has the job requeued and leaves
                process.terminate()
                raise
        if status:
            sys.exit(status if status > 0 else 128 - status)

    def checkpoint(self) -> DelayedSubmission:
        """Returns what submitit submits again when the time limit is near."""
        return DelayedSubmission(self)
