"""The job that submitit pickles, carries to the compute nodes and calls there, once per rank.

Nothing heavy is imported before the call, so that the login node and the pickle know nothing of torch. The run
folder carries the state and the pickle only its name: a job that SLURM itself requeues after a node failure starts
from the pickle as it was first submitted, and still goes on where it was.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import re
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from submitit.helpers import DelayedSubmission

from crate_dist.errors import UserError
from crate_dist.run.exit_status import LEAVE_NODE, LOST_THE_RUN, NEEDS_A_PERSON, STOPPED, TRY_AGAIN
from crate_dist.run.faults import may_pass

if TYPE_CHECKING:
    from crate_dist.training.trainer import TrainResult

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
        """Runs this rank until the recipe is complete; returns TrainResult's fields, readable without torch.

        Otherwise it ends the process with a status by which the batch script knows whether to start the job again.
        """
        for number in (signal.SIGUSR2, signal.SIGTERM):
            # Until the training takes over the signals there is nothing to save, and imports and rendezvous may last
            # longer than the notice.
            signal.signal(number, lambda *_: os._exit(STOPPED))
        _say(f"start {_start()}: rank {_rank()} on node {_node()}")
        try:
            result = self._train()
        except UserError as error:
            logger.error("%s", error)
            _end(error)
        except Exception as error:
            logger.exception("unexpected")
            _end(error)
        if not result.finished:
            # At once: srun sends SIGTERM to ranks that end a little later than the first, and while an interpreter ends
            # in order nothing answers it any more; a rank that a signal has killed would look like a fault.
            logging.shutdown()
            os._exit(STOPPED)
        return dataclasses.asdict(result)

    def _train(self) -> TrainResult:
        """Imports what is heavy, looks at the node, and trains; what it raises ends the job, or starts it again."""
        from crate_dist.distributed import lost_a_rank
        from crate_dist.doctor.start import PATIENCE_S, NodeIsAtFault, look_before_start
        from crate_dist.run.lock import LostTheRun
        from crate_dist.train import train
        from crate_dist.world import detect_world

        try:
            if (world := detect_world()).local_rank == 0:
                look_before_start(self.run_dir, world)
            return train(self.run_dir, accept_changed_data=self.accepted_data)
        except NodeIsAtFault as error:
            logger.error("%s", error)
            _say_unfit(str(error))
            time.sleep(PATIENCE_S)  # for the other nodes to say so too: what is wrong on all is no node's fault
            logging.shutdown()
            os._exit(LEAVE_NODE)
        except LostTheRun as error:
            logger.critical("%s", error)
            logging.shutdown()
            os._exit(LOST_THE_RUN)
        except RuntimeError as error:
            if isinstance(error, UserError) or not lost_a_rank(error):
                raise
            logger.exception("this rank has lost another one")
            _end(error, is_the_cause=False)

    def checkpoint(self) -> DelayedSubmission:
        """Returns what submitit submits again when a signal comes before the training has taken over the signals.

        It is called inside a signal handler and on rank 0 alone, where a save, in which all ranks take part, would
        wait for ever: the run goes on from the newest checkpoint that there is.
        """
        return DelayedSubmission(self)


def _end(error: BaseException, is_the_cause: bool = True) -> NoReturn:
    """Ends the process at once: an interpreter in order waits for its loader, and nccl for ranks that are gone."""
    text = " ".join(str(error).split())[:1000]
    _say(f"{'fault' if is_the_cause else 'lost'}: rank {_rank()} on node {_node()}: {type(error).__name__}: {text}")
    if re.search("CUDA (driver )?error|CUDNN_STATUS|CUBLAS_STATUS|NCCL error", text):
        from crate_dist.doctor.nvidia import gpu_faults

        for fault in gpu_faults()[:1]:
            _say_unfit(fault)
    logging.shutdown()
    os._exit(TRY_AGAIN if may_pass(error) else NEEDS_A_PERSON)


def _say_unfit(why: str) -> None:
    """Has the batch script leave this node."""
    _say(f"unfit: rank {_rank()} on node {_node()}: {' '.join(why.split())}")


def _say(what: str) -> None:
    """Prints a line in the form that slurm/batch.sh looks for in the logs of the ranks."""
    print(f"crate-dist {what}", flush=True)  # noqa: T201


def _start() -> str:
    """Numbers this start of the job: how often it was requeued, and which srun of its batch script this one is."""
    return f"{os.environ.get('SLURM_RESTART_COUNT', '0')}.{os.environ.get('CRATE_START', '1')}"


def _rank() -> str:
    return os.environ.get("SLURM_PROCID", os.environ.get("RANK", "0"))


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME", platform.node())
