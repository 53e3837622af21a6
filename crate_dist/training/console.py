"""Says on the terminal and in the log how a run is doing: a progress bar, a line per report, what needs care."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from tqdm import tqdm

from crate_dist.checkpoint.saving import Saved
from crate_dist.config import Recipe
from crate_dist.data.workers import workers_of_rank
from crate_dist.training.optim import Schedule
from crate_dist.wording import duration, share
from crate_dist.world import World

logger = logging.getLogger(__name__)

_MUCH_WAITING = 0.1


class Console:
    """What rank 0 says; the other ranks say nothing.

    step, last_step: where this start begins, and where the run ends; top1: of the newest evaluation, in per cent
    """

    def __init__(
        self, recipe: Recipe, world: World, schedule: Schedule, step: int, last_step: int, top1: float | None = None
    ) -> None:
        self._recipe, self._world, self._schedule, self._last_step = recipe, world, schedule, last_step
        self._values = {} if top1 is None else {"val/top1": top1}
        self._reports = 0
        self._warned = False
        self._bar = _Bar(
            self._progress,
            total=last_step,
            initial=step,
            disable=not (world.is_main and sys.stderr.isatty()),
            dynamic_ncols=True,
            bar_format="{line} {bar}",
        )

    def step(self) -> None:
        """Counts one step. A terminal that has gone away gets no bar any more."""
        try:
            self._bar.update()
        except OSError:
            self._bar.disable = True

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Says what has been reported; see Monitor.report."""
        self._warn_of_waiting(values["speed/data_wait_fraction"])
        if not self._world.is_main:
            return
        self._values |= values
        logger.info(
            "step %d/%d  epoch %.2f/%d  loss %.4f  lr %.3g  norm %.3g  %s images/s  data wait %s  %s  %s left",
            step,
            self._last_step,
            values["train/epoch"],
            self._schedule.epochs,
            values["train/loss"],
            values["train/lr"],
            values["train/grad_norm"],
            f"{values['speed/images_per_s']:,.0f}",
            share(values["speed/data_wait_fraction"]),
            _use_of_devices(values),
            self._left(step),
        )

    def evaluation(self, step: int, values: Mapping[str, float], unreadable: int) -> None:
        """Says how an evaluation ended. unreadable: samples that do not count."""
        if not self._world.is_main:
            return
        self._values |= values
        kinds = {"": "", "ema_": "; of the averaged weights "} if "val/ema_top1" in values else {"": ""}
        text = "".join(
            f"{what}top-1 {values[f'val/{of}top1']:.2f} %, top-5 {values[f'val/{of}top5']:.2f} %, "
            f"loss {values[f'val/{of}loss']:.4f}"
            for of, what in kinds.items()
        )
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
        with suppress(OSError):
            self._bar.close()

    def _left(self, step: int) -> str:
        images = (self._last_step - step) * self._recipe.train.global_batch
        return duration(images / max(self._values["speed/images_per_s"], 1e-9))

    def _progress(self, step: int, width: int) -> str:
        """Returns what stands beside the bar: the longest of three spellings that leaves it a column or more."""
        for spelling in range(3):
            text = ("  " if spelling == 0 else " ").join(part[spelling] for part in self._parts(step))
            if len(text) < width - 1:
                break
        return text

    def _parts(self, step: int) -> list[tuple[str, str, str]]:
        epoch, epochs, last = step / self._schedule.steps_per_epoch, self._schedule.epochs, self._last_step
        short = f"epoch {int(epoch)}/{epochs}"
        parts = [
            (f"epoch {epoch:.2f}/{epochs}", short, short),
            (f"step {step:,}/{last:,}", f"step {step}/{last}", f"step {step}"),
        ]
        if (loss := self._values.get("train/loss")) is not None:
            parts.append((f"loss {loss:.4f}", f"loss {loss:.3f}", f"loss {loss:.3f}"))
        if (top1 := self._values.get("val/top1")) is not None:
            parts.append((f"top-1 {top1:.2f} %", f"top-1 {top1:.1f}", f"top-1 {top1:.1f}"))
        if (speed := self._values.get("speed/images_per_s")) is not None:
            left = self._left(step)
            short = left.replace("min", "m").replace(" ", "")
            parts.append((f"{speed:,.0f} images/s", f"{speed:.0f} images/s", f"{speed:.0f} images/s"))
            parts.append((f"{left} left", f"{short} left", f"{short} left"))
        return parts

    def _warn_of_waiting(self, fraction: float) -> None:
        """Warns once per start: the first intervals have the loader's start in them and do not count."""
        self._reports += 1
        if fraction > _MUCH_WAITING and self._reports > 2 and not self._warned and self._world.is_main:
            self._warned = True
            logger.warning(
                "%s of the time is spent waiting for data. More data.workers help while there are idle cores "
                "(%d here for %d x %d workers); beyond that, shards re-encoded with --short-side",
                share(fraction),
                len(os.sched_getaffinity(0)),
                self._world.local_world_size,
                workers_of_rank(self._recipe.data.workers, self._world.cores),
            )


class _Bar(tqdm):
    """A progress bar with a line of its own beside it. line: of the steps made and the width of the terminal"""

    def __init__(self, line: Callable[[int, int], str], **options: Any) -> None:
        self._line = line
        super().__init__(**options)

    @property
    def format_dict(self) -> dict[str, Any]:
        """What tqdm can write beside the bar, and `line`."""
        facts = dict(super().format_dict)
        return facts | {"line": self._line(facts["n"], facts["ncols"] or 80)}


def _use_of_devices(values: Mapping[str, float]) -> str:
    """Says MFU, where it is known, and the peak memory of the fullest GPU, or of the largest process."""
    mfu, host_gb = values.get("speed/mfu"), values["memory/host_peak_gb"]
    used = f"peak memory {values.get('memory/device_reserved_gb', host_gb):.1f} GB"
    return used if mfu is None else f"MFU {mfu:.1%}  {used}"
