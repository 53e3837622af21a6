"""Traces log.profile_steps on every rank: what the host asked for and when, and on a GPU what it did and when.

A file per rank, in Chrome's format, which ui.perfetto.dev opens, chrome://tracing, and TensorBoard with
torch-tb-profiler. A traced step takes longer than others: its speed is no measure of the run's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from crate_dist.config import Recipe
from crate_dist.run.folder import RunFolder
from crate_dist.run.lock import Tenure
from crate_dist.training.watchdog import Watchdog
from crate_dist.world import World

logger = logging.getLogger(__name__)


class StepTrace:
    """Traces those of the steps log.profile_steps that this start takes; of others nothing is recorded.

    step: that was taken last before this start
    """

    def __init__(
        self,
        folder: RunFolder,
        recipe: Recipe,
        world: World,
        device: torch.device,
        step: int,
        watchdog: Watchdog,
        tenure: Tenure,
    ) -> None:
        self._folder, self._world, self._device = folder.profile, world, device
        self._watchdog, self._tenure = watchdog, tenure
        first, self._last = recipe.log.profile_steps or (0, 0)
        self._first = max(first, step + 1)
        self._begin = max(self._first - 1, step + 1)  # one before, in which the profiler gets ready, where there is one
        self._step = step
        self._profiler: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Surrounds the taking of step `number`. What it raises ends the trace, of which then nothing is written."""
        if self._profiler:
            self._profiler.step()
        elif number == self._begin and self._first <= self._last:
            self._profiler = self._started()
        yield
        self._step = number
        if number == self._last:
            self.end()

    def end(self) -> None:
        """Writes what was traced so far, also when the steps end before the window does."""
        profiler, self._profiler = self._profiler, None
        if not profiler:
            return
        self._watchdog.beat("writing a trace")
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # else the last kernels would lie outside
        profiler.stop()
        if self._step < self._first:
            return
        steps = f"{self._first}-{self._step}"
        path = self._folder / f"rank-{self._world.rank:05d}.steps-{steps}.pt.trace.json.gz"
        try:
            self._write(profiler, path)
        except (OSError, RuntimeError) as error:  # a trace is worth no run
            logger.warning("the trace of steps %s could not be written to %s: %s", steps, path, error)
            return
        if self._world.is_main:
            logger.info("traced steps %s: https://ui.perfetto.dev opens %s and the other ranks' beside it", steps, path)

    def _started(self) -> profile:
        def action(step: int) -> ProfilerAction:
            return ProfilerAction.WARMUP if step < self._first != self._begin else ProfilerAction.RECORD

        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it prints that it begins and ends, on every rank
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])]
        profiler = profile(activities=activities, schedule=action)
        profiler.step_num = self._begin  # by which it names the steps
        profiler.start()
        return profiler

    def _write(self, profiler: profile, path: Path) -> None:
        self._tenure.check()
        self._folder.mkdir(exist_ok=True)
        beside = path.with_name(f".writing-{path.name}")
        profiler.export_chrome_trace(str(beside))
        beside.rename(path)
