"""The run's mirror, as its ranks see it: opened before the newest checkpoint is looked for, waited for at the end."""

from __future__ import annotations

import math
import time

import torch.distributed as dist

from crate_dist.checkpoint.mirror.background import Mirror
from crate_dist.config import Recipe
from crate_dist.distributed import gather_objects
from crate_dist.errors import UserError
from crate_dist.run.faults import judged
from crate_dist.run.folder import RunFolder
from crate_dist.run.lock import Tenure
from crate_dist.training.interrupt import Interrupt
from crate_dist.training.watchdog import COMPILING, Watchdog
from crate_dist.world import World

_LONGEST_S = 600.0
_GRACE_S = 30.0
"""Between SIGTERM and SIGKILL: SLURM's KillWait, unless a cluster has another one."""


class Mirroring:
    """Keeps the mirror of a run, which has one or has none; rank 0 copies, and all ranks know whether it does.

    Making it is a collective: it brings back from the mirror what the run folder does not have.
    Raises MirrorError, ShardError, OSError: on every rank.
    """

    def __init__(
        self,
        folder: RunFolder,
        recipe: Recipe,
        world: World,
        interrupt: Interrupt,
        watchdog: Watchdog,
        tenure: Tenure,
    ) -> None:
        self.recipe, self.interrupt, self.watchdog = recipe, interrupt, watchdog
        self.mirror: Mirror | None = None
        problem, place = None, recipe.checkpoint.find_mirror()
        watchdog.beat("looking into the mirror", COMPILING)
        if world.is_main and place is not None:
            try:
                self.mirror = Mirror(place, folder, recipe, tenure)
                self.mirror.begin()
            except (UserError, OSError) as error:
                problem = judged(error)
        problem, self.there = gather_objects((problem, self.mirror is not None))[0]
        if problem is not None:
            raise problem

    def published(self) -> None:
        """Copies the newest checkpoint, in the background."""
        if self.mirror:
            self.mirror.published()

    def leave(self) -> None:
        """Ends a copy that is under way, after an error."""
        if self.mirror:
            self.mirror.leave()

    def finish(self, exported: bool = False) -> None:
        """Waits, for a time, until the newest checkpoint is in the mirror, and the weights where they are exported.

        A collective: srun ends all ranks when the first of them leaves with a status that is not 0.
        """
        if not self.there:
            return
        longest_s = _LONGEST_S if exported or self.interrupt.received_at is not None else _GRACE_S / 2
        patience_s = min(longest_s, 0.5 * COMPILING * self.recipe.safety.hang_timeout_s)
        self.watchdog.beat("waiting for the mirror", COMPILING)
        if self.mirror:
            until = time.monotonic() + patience_s
            self.mirror.finish(lambda: time.monotonic() > min(until, self._leave_by()), exported)
        dist.barrier()

    def _leave_by(self) -> float:
        """Returns the time, by time.monotonic(), at which nothing is waited for any more.

        In the middle of the notice that this rank had, so that the batch script has time as well; none while it was not
        told to stop.
        """
        if self.interrupt.received_at is None:
            return math.inf
        notice_s = self.recipe.cluster.signal_delay_s if self.interrupt.by_slurm else _GRACE_S
        return self.interrupt.received_at + notice_s / 2
