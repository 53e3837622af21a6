"""What a run says: TensorBoard, metrics.jsonl, a progress bar, and one log file per rank.

Curves continue across restarts. Steps behind the checkpoint that a run resumes from are purged, since they are made
again, and each restart leaves a mark.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from crate_dist.checkpoint.saving import Saved
from crate_dist.config import Recipe
from crate_dist.data.decode import Pixels
from crate_dist.data.reader import BadSample
from crate_dist.distributed import World, gather_objects
from crate_dist.errors import UserError
from crate_dist.files import AppendedFile, mended_lines, whole_lines, write_whole
from crate_dist.run.folder import RunFolder
from crate_dist.run.lock import Tenure
from crate_dist.training.ledger import Ledger
from crate_dist.training.optim import Schedule
from crate_dist.training.startup import up_s
from crate_dist.training.tensorboard import Curves

logger = logging.getLogger(__name__)

_MUCH_WAITING = 0.1
_NAMED = 16


class TooManyBadSamples(UserError):
    """More samples than data.max_bad_fraction did not decode."""


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
    ) -> None:
        self._folder, self._recipe, self._world, self._schedule = folder, recipe, world, schedule
        self._device, self._last_step, self._tenure = device, last_step, tenure
        self._bad_images = self._images = self._reports = 0
        self._warned = False
        self._reset()
        self._reported = step
        self._bad: list[BadSample] = []
        self._unreadable: set[BadSample] = set()
        self._bad_reported = 0.0
        self._bad_file: AppendedFile | None = None
        self._curves: Curves | None = None
        self._ledger: Ledger | None = None
        if world.is_main:
            self._open_files(step)
        self._bar = tqdm(
            total=last_step,
            initial=step,
            unit="step",
            disable=not (world.is_main and sys.stderr.isatty()),
            dynamic_ncols=True,
        )

    def add(
        self, loss: torch.Tensor, grad_norm: torch.Tensor, lr: float, images: int, wait_s: float, step_s: float
    ) -> None:
        """Takes up one step of this rank; wait_s of its step_s seconds were spent waiting for data."""
        self._losses.append(loss)
        self._grad_norm, self._lr = grad_norm, lr
        self._images += images
        self._interval_images += images
        self._wait_s += wait_s
        self._busy_s += step_s
        self._bar.update()

    def add_bad(self, bad: Sequence[BadSample]) -> None:
        """Takes up replaced samples; the next report writes them down."""
        self._bad += bad
        self._bad_images += len(bad)
        for item in bad:
            logger.warning("replaced %s: %s", _name(item), item.reason)

    def report(self, step: int) -> None:
        """Reduces what was collected since the last report and writes it. A collective, and a synchronisation.

        Raises TooManyBadSamples on all ranks when one of them had too many.
        """
        if not self._losses:
            return
        mean_loss = torch.stack(self._losses).double().mean()
        began = time.perf_counter()
        norm = float(self._grad_norm)  # waits for the device to finish the step
        self._busy_s += time.perf_counter() - began
        mine = torch.tensor([0.0, self._interval_images, self._busy_s, self._wait_s, self._bad_images])
        mine = mine.double().to(self._device)
        mine[0] = mean_loss
        every = [torch.empty_like(mine) for _ in range(self._world.world_size)]
        dist.all_gather(every, mine)
        losses, images, busy, wait, bad = torch.stack(every).cpu().T
        loss = float(losses.mean())
        per_rank = (images / busy).tolist()
        values = {
            "train/loss": loss,
            "train/lr": self._lr,
            "train/grad_norm": norm,
            "train/epoch": step / self._schedule.steps_per_epoch,
            "speed/images_per_s": float(images.sum() / busy.max()),
            "speed/data_wait_fraction": float((wait / busy).max()),
            "data/bad_samples": float(bad.sum()),
        }
        self._warn_of_waiting(values["speed/data_wait_fraction"])
        self._write(step, values, {f"images_per_s/rank-{rank:05d}": rate for rank, rate in enumerate(per_rank)})
        self._say(step, values)
        if self._ledger:
            self._ledger.note(
                "steps", after=self._reported, step=step, busy_s=float(busy.max()), wait_s=float(wait.max())
            )
        self._reported = step
        if bad.sum() > self._bad_reported:
            self._bad_reported = float(bad.sum())
            self._report_bad()
        self._reset()

    def _report_bad(self) -> None:
        """Rank 0 alone writes down what all ranks have replaced. A collective."""
        # The first few of a run say nothing yet about the share of them.
        too_many = self._bad_images > max(8, self._recipe.data.max_bad_fraction * self._images)
        said = (
            f"{self._bad_images} of the first {self._images} samples of rank {self._world.rank} do not decode, more "
            f"than data.max_bad_fraction = {self._recipe.data.max_bad_fraction}; they are listed in "
            f"{self._folder.bad_samples}"
        )
        every = gather_objects((self._bad, said if too_many else ""))
        self._bad = []
        split = self._recipe.data.train_split
        self._list_bad(
            {"split": split, "rank": rank, **item._asdict()} for rank, (bad, _) in enumerate(every) for item in bad
        )
        for _, problem in every:
            if problem:
                raise TooManyBadSamples(problem)

    def _list_bad(self, items: Iterable[Mapping[str, Any]]) -> None:
        """One line each, by rank 0."""
        if self._world.is_main:
            self._bad_file = self._bad_file or AppendedFile(self._folder.bad_samples, self._tenure.check)
            self._bad_file.append("".join(json.dumps(item) + "\n" for item in items).encode())

    def add_unreadable(self, bad: Sequence[BadSample], problem: str) -> None:
        """Takes up what an evaluation could not read, the same on all ranks; each is named once in a start.

        Raises TooManyBadSamples for a `problem`.
        """
        split = self._recipe.data.val_split
        new = [item for item in bad if item not in self._unreadable]
        self._unreadable.update(new)
        if new:
            self._list_bad({"split": split, **item._asdict()} for item in new)
        for item in new[:_NAMED] if self._world.is_main else ():
            logger.warning("left out of %s: %s: %s", split, _name(item), item.reason)
        if len(new) > _NAMED and self._world.is_main:
            logger.warning("and %d more, listed in %s", len(new) - _NAMED, self._folder.bad_samples)
        if problem:
            raise TooManyBadSamples(
                f"{split}: {problem}; that is more than data.max_bad_fraction = {self._recipe.data.max_bad_fraction}; "
                f"they are listed in {self._folder.bad_samples}"
            )

    def evaluation(self, step: int, values: dict[str, float], seconds: float, unreadable: int = 0) -> None:
        """Writes the outcome of an evaluation: names such as "val/top1", unless a start that was killed before its save
        has written the same. unreadable: samples that do not count."""
        values = values | ({"data/bad_val_samples": float(unreadable)} if unreadable else {})
        if self._world.is_main and not any(line.items() >= values.items() for line in self._lines_of(step)):
            self._write(step, values)
        if self._ledger:
            self._ledger.note("evaluation", step=step, seconds=seconds)
        if self._world.is_main:
            text = ", ".join(f"{name.rpartition('/')[2]} {value:.4g}" for name, value in values.items())
            text += f"; {unreadable} samples could not be read and do not count" if unreadable else ""
            logger.info("epoch %.4g, evaluation: %s", step / self._schedule.steps_per_epoch, text)

    def white_box(
        self,
        step: int,
        layers: Mapping[str, Sequence[float]],
        pictures: Mapping[str, Pixels],
        charts: Mapping[str, Mapping[str, str]],
        seconds: float,
    ) -> None:
        """Writes one measurement of every layer. layers: name -> values, the first layer first; see live.py."""
        if not self._curves or not self._ledger:
            return
        for name, values in layers.items():
            for layer, value in enumerate(values, start=1):
                self._curves.scalar(f"{name}/layer-{layer:02d}", value, step)
        for name, pixels in pictures.items():
            self._curves.picture(name, pixels, step)
        self._curves.charts(charts, step)
        self._append_line(step, layers)
        self._ledger.note("whitebox", step=step, seconds=seconds)

    def knows(self, step: int, name: str) -> bool:
        """Whether a value of this name was written for this step, by whatever start. On rank 0."""
        return any(name in line for line in self._lines_of(step))

    def _lines_of(self, step: int) -> list[dict[str, Any]]:
        lines = map(_line, whole_lines(self._folder.metrics))
        return [line for line in lines if line is not None and line["step"] == step]

    def saved(self, saved: Saved | None) -> None:
        """Writes how long a save took, and where the time has gone so far."""
        if saved is None or not self._curves or not self._ledger:
            return
        self._ledger.note("save", step=saved.step, stall_s=saved.stall_s, total_s=saved.total_s)
        values = {"checkpoint/stall_s": saved.stall_s, "checkpoint/total_s": saved.total_s}
        for name, value in {**values, **self._ledger.totals.scalars()}.items():
            self._curves.scalar(name, value, saved.step)

    def flush(self) -> None:
        """Brings everything to disk, so that a checkpoint never knows more than the curves do."""
        if self._curves:
            self._curves.sync()
            self._lines.sync()

    def close(self) -> None:
        """Ends the progress bar and closes the files."""
        self._bar.close()
        if self._curves and self._ledger:
            self._ledger.note("end")
            logger.info("%s", self._ledger.totals)
            self.flush()
            self._curves.close()
            self._lines.close()

    def _open_files(self, step: int) -> None:
        check, facts = self._tenure.check, {"step": step, "world_size": self._world.world_size}
        check()
        self._ledger = Ledger(self._folder.ledger, up_s(), check)
        self._ledger.note("start", **facts)
        restarts = self._folder.note_start(check, **facts, launcher=self._world.launcher)
        _truncate_lines(self._folder.metrics, step, self._tenure.check)
        self._lines = AppendedFile(self._folder.metrics, self._tenure.check)
        purge_step = step + 1 if restarts else None
        self._curves = Curves(self._folder.tensorboard, purge_step, self._tenure.check)
        if not restarts:
            self._curves.text("recipe", "\n".join("    " + s for s in self._recipe.to_toml().splitlines()), 0)
        else:
            self._curves.scalar("run/restarts", restarts, step + 1)
            text = f"restart {restarts} at step {step} on {self._world.world_size} ranks"
            self._curves.text("run/restarted", text, step + 1)
            logger.info(text)

    def _write(self, step: int, values: dict[str, float], curves_only: dict[str, float] | None = None) -> None:
        if not self._curves:
            return
        for name, value in {**values, **(curves_only or {})}.items():
            self._curves.scalar(name, value, step)
        self._append_line(step, values)

    def _append_line(self, step: int, values: Mapping[str, Any]) -> None:
        line = {"step": step, **values, "time": round(time.time(), 3)}
        self._lines.append((json.dumps(line) + "\n").encode())

    def _say(self, step: int, values: dict[str, float]) -> None:
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

    def _warn_of_waiting(self, fraction: float) -> None:
        """Once per run and rank: the first intervals have the loader's start in them and do not count."""
        self._reports += 1
        if fraction > _MUCH_WAITING and self._reports > 2 and not self._warned and self._world.is_main:
            self._warned = True
            logger.warning(
                "%.0f %% of the time is spent waiting for data. More data.workers help while there are idle cores "
                "(%d here for %d x %d workers); beyond that, shards re-encoded with --short-side",
                100 * fraction,
                len(os.sched_getaffinity(0)),
                self._world.local_world_size,
                self._recipe.data.workers,
            )

    def _reset(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._interval_images, self._wait_s, self._busy_s = 0, 0.0, 0.0


def start_logging(folder: RunFolder, world: World) -> None:
    """Sends this rank's log to its file, and rank 0's to the terminal too, beside the progress bar."""
    handlers: list[logging.Handler] = [logging.FileHandler(folder.log_file(world.rank), encoding="utf-8")]
    if world.is_main:
        handlers.append(_BesideTheBar())
    form = logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%Y-%m-%d %H:%M:%S")
    root = logging.getLogger()
    for handler in handlers:
        handler.setFormatter(form)
    root.handlers = handlers
    root.setLevel(logging.INFO)


class _BesideTheBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno > logging.INFO or not sys.stderr.isatty() or not record.getMessage().startswith("step "):
            tqdm.write(self.format(record), file=sys.stderr)  # with a bar in sight its postfix says the steps


def _name(item: BadSample) -> str:
    """Of a sample, in one line: it is the shard's own, and a line break in it would begin another message."""
    return repr(f"{item.key} of {item.shard}")[1:-1]


def _truncate_lines(path: Path, step: int, check: Callable[[], None]) -> None:
    """Drops the lines of later steps, and what a crash cut off. Without such, nothing is written."""
    lines = mended_lines(path)
    kept = [text for text in lines if (line := _line(text)) is not None and line["step"] <= step]
    if kept != lines:
        check()
        write_whole(path, "".join(text + "\n" for text in kept))


def _line(text: str) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None for what is none."""
    try:
        line = json.loads(text)
        return line if isinstance(line, dict) and int(line["step"]) >= 0 else None
    except (ValueError, KeyError, TypeError):
        return None
