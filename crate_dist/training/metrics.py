"""Collects what a run measures, and gives it to its trackers, metrics.jsonl, the ledger and the console.

Curves continue across restarts. Steps behind the checkpoint that a run resumes from are purged, since they are made
again, and each restart leaves a mark.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from crate_dist.checkpoint.saving import Saved
from crate_dist.config import Recipe
from crate_dist.data.decode import Pixels
from crate_dist.distributed import gather_objects
from crate_dist.files import AppendedFile, mended_lines, whole_lines, write_whole
from crate_dist.run.dashboard import tags_of
from crate_dist.run.folder import RunFolder
from crate_dist.run.ledger import Ledger
from crate_dist.run.lock import Tenure
from crate_dist.run.rank_logs import restarts as known_restarts
from crate_dist.training import dashboard
from crate_dist.training.bad_samples import BadSamples
from crate_dist.training.console import Console
from crate_dist.training.optim import Schedule
from crate_dist.training.startup import up_s
from crate_dist.training.stragglers import Stragglers
from crate_dist.training.tensorboard import Curves
from crate_dist.training.trackers import Tracker, Trackers
from crate_dist.training.utilisation import Utilisation, peak_memory_gb
from crate_dist.training.wandb_run import WandbRun
from crate_dist.whitebox.over_time import layers_over_time
from crate_dist.world import World, node_name

logger = logging.getLogger(__name__)


class Monitor:
    """Collects what every step yields and reports it every few steps; rank 0 writes."""

    def __init__(
        self,
        folder: RunFolder,
        recipe: Recipe,
        world: World,
        device: torch.device,
        schedule: Schedule,
        step: int,
        last_step: int,
        tenure: Tenure,
        utilisation: Utilisation,
    ) -> None:
        self._folder, self._recipe, self._world, self._schedule = folder, recipe, world, schedule
        self._device, self._tenure, self._utilisation = device, tenure, utilisation
        self.bad = BadSamples(folder, recipe, world, tenure)
        self._images, self._last_step = 0, last_step
        self._stragglers = Stragglers(gather_objects(node_name()))
        self._reset()
        self._reported, self._bad_reported = step, 0.0
        self._trackers = Trackers([])
        self._curves: Curves | None = None
        self._charted = False
        self._ledger: Ledger | None = None
        if world.is_main:
            self._open_files(step)
        self._console = Console(recipe, world, schedule, step, last_step, self._newest_top1())

    def add(
        self,
        loss: torch.Tensor,
        hits: torch.Tensor,
        grad_norm: torch.Tensor,
        lr: float,
        images: int,
        wait_s: float,
        step_s: float,
    ) -> None:
        """Takes up one step of this rank; wait_s of its step_s seconds were spent waiting for data."""
        self._losses.append(loss)
        self._hits.append(hits)
        self._grad_norm, self._lr = grad_norm, lr
        self._images += images
        self._interval_images += images
        self._wait_s += wait_s
        self._busy_s += step_s
        self._console.step()

    def waited_for_device(self, seconds: float) -> None:
        """Takes up what this rank has waited for the device to finish the steps that it was given."""
        self._busy_s += seconds

    def report(self, step: int, own_s: float) -> None:
        """Reduces what was collected since the last report and writes it. A collective, and a synchronisation.

        own_s: that this rank was by itself; see stragglers.py

        Raises TooManyBadSamples on all ranks when one of them had too many.
        """
        if not self._losses:
            return
        mean_loss = torch.stack(self._losses).double().mean()
        peaks = peak_memory_gb(self._device)
        numbers = 0.0, 0.0, self._interval_images, self._busy_s, self._wait_s, self.bad.replaced, own_s, *peaks.values()
        mine = torch.tensor(numbers, dtype=torch.float64).to(self._device)
        mine[0], mine[1] = mean_loss, torch.stack(self._hits).sum()
        every = [torch.empty_like(mine) for _ in range(self._world.world_size)]
        dist.all_gather(every, mine)
        losses, hits, images, busy, wait, bad, own, *most = torch.stack(every).cpu().T
        images_per_s = float(images.sum() / busy.max())
        per_rank = (images / busy).tolist()
        values = {
            "train/loss": float(losses.mean()),
            "train/top1": 100 * float(hits.sum() / images.sum()),
            "train/lr": self._lr,
            "train/grad_norm": float(self._grad_norm),
            "train/epoch": step / self._schedule.steps_per_epoch,
            "speed/images_per_s": images_per_s,
            "speed/data_wait_fraction": float((wait / busy).max()),
            "run/left_h": (self._last_step - step) * self._recipe.train.global_batch / max(images_per_s, 1e-9) / 3600,
            **self._utilisation.scalars(images_per_s),
            **{name: float(peak.max()) for name, peak in zip(peaks, most, strict=True)},
            "data/bad_samples": float(bad.sum()),
        }
        self._write(step, values, {f"images_per_s/rank-{rank:05d}": rate for rank, rate in enumerate(per_rank)})
        self._console.report(step, values)
        self._name_stragglers(step, own.tolist(), wait.tolist(), float(busy.max()))
        if self._ledger:
            self._ledger.note(
                "steps", after=self._reported, step=step, busy_s=float(busy.max()), wait_s=float(wait.max())
            )
        self._reported = step
        if bad.sum() > self._bad_reported:
            self._bad_reported = float(bad.sum())
            self.bad.report(self._images)
        self._reset()

    def pictures(self, step: int, pictures: Mapping[str, Pixels]) -> None:
        """Gives pictures, uint8 (height, width, 3), to the trackers."""
        for name, pixels in pictures.items():
            self._trackers.picture(name, pixels, step)

    def evaluation(
        self,
        step: int,
        values: dict[str, float],
        seconds: float,
        unreadable: int = 0,
        pictures: Mapping[str, Pixels] = MappingProxyType({}),
    ) -> None:
        """Writes the outcome of an evaluation: names such as "val/top1", unless a start that was killed before its save
        has written the same. unreadable: samples that do not count."""
        values = values | ({"data/bad_val_samples": float(unreadable)} if unreadable else {})
        if self._world.is_main and not any(line.items() >= values.items() for line in self._lines_of(step)):
            self._write(step, values)
            self.pictures(step, pictures)
        if self._ledger:
            self._ledger.note("evaluation", step=step, seconds=seconds)
        self._console.evaluation(step, values, unreadable)

    def white_box(
        self,
        step: int,
        layers: Mapping[str, Sequence[float]],
        pictures: Mapping[str, Pixels],
        began: float,
    ) -> None:
        """Writes one measurement of every layer, and what it took since `began`, by time.perf_counter.

        layers: name -> values, the first layer first; see live.py
        """
        if not self._ledger:
            return
        self._chart(step, layers)
        for name, values in layers.items():
            self._trackers.layers(name, values, step)
        self.pictures(step, pictures)
        self._append_line(step, layers)
        self.pictures(step, self._over_time(layers))
        self._ledger.note("whitebox", step=step, seconds=time.perf_counter() - began)

    def _over_time(self, names: Iterable[str]) -> dict[str, Pixels]:
        """Draws what all starts have measured, by their lines, which were taken away with the steps that are redone."""
        texts = [text for text in whole_lines(self._folder.metrics) if '"whitebox/' in text]
        lines = [line for text in texts if (line := _line(text)) is not None]
        pictures = {}
        for name, title in dashboard.measure_titles(self._recipe, names).items():
            steps, values = zip(*((line["step"], line[name]) for line in lines if name in line), strict=True)
            drawn = layers_over_time(title, steps, np.array(values, dtype=float))
            pictures[name.replace("/", "/over_time/", 1)] = drawn
        return pictures

    def knows(self, step: int, name: str) -> bool:
        """Says whether a value of this name was written for this step, by whatever start. On rank 0."""
        return any(name in line for line in self._lines_of(step))

    def _newest_top1(self) -> float | None:
        lines = map(_line, reversed(whole_lines(self._folder.metrics) if self._world.is_main else []))
        return next((line["val/top1"] for line in lines if line and "val/top1" in line), None)

    def _lines_of(self, step: int) -> list[dict[str, Any]]:
        lines = map(_line, whole_lines(self._folder.metrics))
        return [line for line in lines if line is not None and line["step"] == step]

    def saved(self, saved: Saved | None) -> None:
        """Writes how long a save took, and where the time has gone so far; warns of one that takes too long."""
        if saved is None:
            return
        self._console.saved(saved)
        if not self._ledger:
            return
        self._ledger.note("save", step=saved.step, stall_s=saved.stall_s, total_s=saved.total_s)
        values = {"checkpoint/stall_s": saved.stall_s, "checkpoint/total_s": saved.total_s}
        self._trackers.scalars({**values, **self._ledger.totals.scalars()}, saved.step)

    def flush(self) -> None:
        """Brings everything to disk, so that a checkpoint never knows more than the curves do."""
        self._trackers.sync()
        if self._ledger:
            self._lines.sync()

    def close(self) -> None:
        """Ends the progress bar and closes the files."""
        self._console.close()
        if self._ledger:
            self._ledger.note("end")
            self.flush()
            self._trackers.close()
            self._lines.close()

    def _open_files(self, step: int) -> None:
        check, facts = self._tenure.check, {"step": step, "world_size": self._world.world_size}
        check()
        self._ledger = Ledger(self._folder.ledger, up_s(), check)
        self._ledger.note("start", **facts)
        restarts = self._folder.record.note_start(check, **facts, launcher=self._world.launcher)
        _truncate_lines(self._folder.metrics, step, self._tenure.check)
        self._lines = AppendedFile(self._folder.metrics, self._tenure.check)
        purge_step = step + 1 if restarts else None
        trackers: list[Tracker] = []
        if "tensorboard" in self._recipe.log.trackers:
            self._curves = self._open_curves(step, purge_step)
            trackers.append(self._curves)
        if "wandb" in self._recipe.log.trackers:
            lines = filter(None, map(_line, whole_lines(self._folder.metrics)))
            trackers.append(WandbRun(self._folder, self._recipe, lines, self._tenure.check))
        self._trackers = Trackers(trackers)
        self._tell(step, restarts)

    def _open_curves(self, step: int, purge_step: int | None) -> Curves:
        named, place = tags_of(self._folder), self._folder.path.resolve()
        curves = Curves(self._folder.tensorboard, purge_step, self._tenure.check, named)
        if not self._recipe.log.whitebox_every_steps:
            curves.charts(dashboard.charts(named, averaged=self._recipe.optim.ema_decay > 0), step)
        curves.settings(f"{place.parent.name}/{place.name}", self._recipe.deciding_values())
        return curves

    def _chart(self, step: int, layers: Iterable[str]) -> None:
        """Lays the charts out once per start, when it is known what the layers have: TensorBoard takes the first."""
        if self._curves and not self._charted:
            titles = dashboard.measure_titles(self._recipe, layers)
            self._curves.charts(dashboard.charts(tags_of(self._folder), titles, self._recipe.optim.ema_decay > 0), step)
            self._charted = True

    def _tell(self, step: int, restarts: int) -> None:
        """Gives the trackers what the run is, and how often it was started."""
        record, at = self._folder.record, step + 1 if restarts else 0
        device = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "CPU"
        self._trackers.text("recipe", dashboard.recipe_text(self._recipe), at)
        self._trackers.text("environment", dashboard.environment_text(record.code(), device=device), at)
        if restarts:
            self._trackers.scalars({"run/restarts": restarts}, step + 1)
            text = f"restart {restarts} at step {step} on {self._world.world_size} ranks"
            if changed := record.changed_code():
                text += f", with other code than before: {changed}"
            logger.info(text)
        try:
            reasons = [restart.why for restart in known_restarts(self._folder)]
        except OSError as error:  # a rank's log of another user
            reasons = []
            logger.warning("why the run was started again is not shown: %s", error)
        self._trackers.text("starts", dashboard.starts_text(record.starts(), reasons), step + 1)

    def _write(self, step: int, values: dict[str, float], curves_only: dict[str, float] | None = None) -> None:
        if self._ledger:
            self._trackers.scalars({**values, **(curves_only or {})}, step)
            self._append_line(step, values)

    def _append_line(self, step: int, values: Mapping[str, Any]) -> None:
        line = {"step": step, **values, "time": round(time.time(), 3)}
        self._lines.append((json.dumps(line) + "\n").encode())

    def _name_stragglers(self, step: int, own_s: list[float], wait_s: list[float], busy_s: float) -> None:
        lag = self._stragglers.note(step - self._reported, own_s, wait_s, busy_s)
        if not self._world.is_main or lag is None or self._world.world_size == 1:
            return
        self._trackers.scalars({"stragglers/slowest_rank": lag.rank, "stragglers/slowest_rank_lag": lag.lost}, step)
        if lag.text:
            self._trackers.text("stragglers", lag.text, step)
            logger.warning("%s", lag.text)

    def _reset(self) -> None:
        self._losses, self._hits = list[torch.Tensor](), list[torch.Tensor]()
        self._interval_images, self._wait_s, self._busy_s = 0, 0.0, 0.0


def _truncate_lines(path: Path, step: int, check: Callable[[], None]) -> None:
    """Drops the lines of later steps, and what a crash cut off. Without such, nothing is written."""
    lines = mended_lines(path)
    kept = [text for text in lines if (line := _line(text)) is not None and line["step"] <= step]
    if kept != lines:
        check()
        write_whole(path, "".join(text + "\n" for text in kept))


def _line(text: str) -> dict[str, Any] | None:
    """Parses a line of metrics.jsonl; None for what is none."""
    try:
        line = json.loads(text)
        return line if isinstance(line, dict) and int(line["step"]) >= 0 else None
    except (ValueError, KeyError, TypeError):
        return None
