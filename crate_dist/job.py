"""What submitit pickles, carries to the compute nodes and calls there, once per rank.

Nothing heavy is imported before the call, so that the login node and the pickle know nothing of torch. The run
folder carries the state and the pickle only its name: a job that SLURM itself requeues after a node failure starts
from the pickle as it was first submitted, and still goes on where it was.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from submitit.helpers import DelayedSubmission


class TrainJob:
    """One run on the ranks of a SLURM job."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def __call__(self) -> dict[str, Any]:
        """Runs this rank until the recipe is complete; gives TrainResult's fields, readable without torch.

        A run that a signal has stopped ends the process with a status at which the batch script requeues the job.
        """
        from crate_dist.train import train
        from crate_dist.watchdog import TRY_AGAIN

        result = train(self.run_dir)
        if not result.finished:
            sys.exit(TRY_AGAIN)
        return dataclasses.asdict(result)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit submits again when a signal comes before the training has taken over the signals.

        It is called inside a signal handler and on rank 0 alone, where a save, in which all ranks take part, would
        wait for ever: the run goes on from the newest checkpoint that there is.
        """
        return DelayedSubmission(self)
