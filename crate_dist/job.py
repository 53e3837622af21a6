"""What submitit pickles, carries to the compute nodes and calls there, once per rank.

Nothing heavy is imported before the call, so that the login node and the pickle know nothing of torch. The run
folder carries the state and the pickle only its name: a job that SLURM itself requeues after a node failure starts
from the pickle as it was first submitted, and still goes on where it was.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from submitit.helpers import DelayedSubmission

from crate_dist.status import NEEDS_A_PERSON, TRY_AGAIN

logger = logging.getLogger(__name__)


class TrainJob:
    """One run on the ranks of a SLURM job."""

    accepted_data: str | bool = False
    """Digest of data that are accepted though not the checkpoint's; pickled only where there are such."""

    def __init__(self, run_dir: Path, accepted_data: str | bool = False) -> None:
        self.run_dir = run_dir
        if accepted_data:
            self.accepted_data = accepted_data

    def __call__(self) -> dict[str, Any]:
        """Runs this rank until the recipe is complete; gives TrainResult's fields, readable without torch.

        Otherwise it ends the process with a status by which the batch script knows whether to requeue the job.
        """
        for number in (signal.SIGUSR2, signal.SIGTERM):
            # Until the training takes over the signals there is nothing to save, and imports and rendezvous may last
            # longer than the notice.
            signal.signal(number, lambda *_: os._exit(TRY_AGAIN))
        from crate_dist.distributed import lost_a_rank
        from crate_dist.train import EXPECTED_ERRORS, train

        try:
            result = train(self.run_dir, accept_changed_data=self.accepted_data)
        except EXPECTED_ERRORS as error:
            logger.error("%s", error)
            _end(NEEDS_A_PERSON)
        except Exception as error:
            logger.exception("this rank has lost another one" if lost_a_rank(error) else "unexpected")
            _end(TRY_AGAIN if lost_a_rank(error) else NEEDS_A_PERSON)
        if not result.finished:
            sys.exit(TRY_AGAIN)
        return dataclasses.asdict(result)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit submits again when a signal comes before the training has taken over the signals.

        It is called inside a signal handler and on rank 0 alone, where a save, in which all ranks take part, would
        wait for ever: the run goes on from the newest checkpoint that there is.
        """
        return DelayedSubmission(self)


def _end(status: int) -> NoReturn:
    """At once: an interpreter that ends in order waits for its loader, and nccl for ranks that are gone."""
    logging.shutdown()
    os._exit(status)
