"""Says on the terminal and in the log how a run is doing: a progress bar, a line per report, what needs care."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping

from tqdm import tqdm

from crate_dist.checkpoint.saving import Saved
from crate_dist.config import Recipe
from crate_dist.data.workers import workers_of_rank
from crate_dist.training.optim import Schedule
from crate_dist.world import World

logger = logging.getLogger(__name__)

_MUCH_WAITING = 0.1


class Console:
    """What rank 0 says; the other ranks say nothing.

    step, last_step: where this start begins, and where the run ends
    """

    def __init__(self, recipe: Recipe, world: World, schedule: Schedule, step: int, last_step: int) -> None:
        self._recipe, self._world, self._schedule, self._last_step = recipe, world, schedule, last_step
        self._reports = 0
        self._warned = False
        self._bar = tqdm(
            total=last_step,
            initial=step,
            unit="step",
            disable=not (world.is_main and sys.stderr.isatty()),
            dynamic_ncols=True,
        )

    def step(self) -> None:
        """Counts one step."""
        self._bar.update()

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Says what has been reported; see Monitor.report."""
        self._warn_of_waiting(values["speed/data_wait_fraction"])
        if not self._world.is_main:
            return
        facts = (
            f"loss {values['train/loss']:.4f}  lr {values['train/lr']:.3g}  norm {values['train/grad_norm']:.3g}  "
            f"{values['speed/images_per_s']:,.0f} images/s  data wait {values['speed/data_wait_fraction']:.0%}"
        )
        self._bar.set_postfix_str(facts)
        left_images = (self._last_step - step) * self._recipe.train.global_batch
        left_s = left_images / max(values["speed/images_per_s"], 1e-9)
        logger.info(
            "step %d/%d  epoch %.2f/%d  %s  %s left",
            step,
            self._last_step,
            values["train/epoch"],
            self._schedule.epochs,
            facts,
            tqdm.format_interval(left_s),
        )

    def evaluation(self, step: int, values: Mapping[str, float], unreadable: int) -> None:
        """Says how an evaluation ended. unreadable: samples that do not count."""
        if not self._world.is_main:
            return
        text = ", ".join(f"{name.rpartition('/')[2]} {value:.4g}" for name, value in values.items())
        text += f"; {unreadable} samples could not be read and do not count" if unreadable else ""
        logger.info("epoch %.4g, evaluation: %s", step / self._schedule.steps_per_epoch, text)

    def saved(self, saved: Saved) -> None:
        """Says in time when the scheduler's notice is too short for a save."""
        seconds, notice_s = saved.total_s, self._recipe.cluster.signal_delay_s
        if seconds > notice_s / 2 and self._world.launcher == "slurm":
            logger.warning(
                "a save takes %.0f s, and the job is told only %d s before its end; "
                "give it --set cluster.signal_delay_s=%d or more",
                seconds,
                notice_s,
                int(4 * seconds),
            )

    def close(self) -> None:
        """Ends the progress bar."""
        self._bar.close()

    def _warn_of_waiting(self, fraction: float) -> None:
        """Warns once per start: the first intervals have the loader's start in them and do not count."""
        self._reports += 1
        if fraction > _MUCH_WAITING and self._reports > 2 and not self._warned and self._world.is_main:
            self._warned = True
            logger.warning(
                "%.0f %% of the time is spent waiting for data. More data.workers help while there are idle cores "
                "(%d here for %d x %d workers); beyond that, shards re-encoded with --short-side",
                100 * fraction,
                len(os.sched_getaffinity(0)),
                self._world.local_world_size,
                workers_of_rank(self._recipe.data.workers, self._world.cores),
            )
