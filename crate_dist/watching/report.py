"""The report at the end of a run: what came of it, where the time went, where everything lies, what to type next."""

from __future__ import annotations

import shlex
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from crate_dist.run.checkpoints import judged_top1
from crate_dist.run.dashboard import how_to_watch
from crate_dist.run.folder import MODELS, RunFolder
from crate_dist.run.ledger import LedgerTotals
from crate_dist.run.rank_logs import restarts
from crate_dist.watching.history import metrics_lines
from crate_dist.watching.runs import Queue, Run, look
from crate_dist.wording import NONE, counted, duration, share

_SLOW = 0.1
"""From this share of the time on something is worth a word."""
_REMEDIES = {
    "waiting for data": "more data.workers help while there are idle cores, beyond that shards made with --short-side",
    "evaluation": "log.eval_every_epochs has it made less often",
    "white-box measures": "log.whitebox_every_steps has them made less often, log.whitebox_images of fewer images",
    "standing still for saves": "checkpoint.every_steps has them made less often",
    "steps made twice": "checkpoint.every_steps has them saved more often",
}
_RESTARTS = 10  # that are named one by one, the newest


def report(folder: RunFolder) -> str:
    """Returns the report on a run that has ended, or is about to; see docs/watching.md.

    Raises OSError, ValueError, KeyError, TypeError: what the run has left cannot be read.
    """
    run, totals = look(folder.path, Queue({}), disk=False), LedgerTotals.read(folder.ledger)
    measured = metrics_lines(folder)
    complete = run.last_step is not None and (run.step or 0) >= run.last_step
    lines = [
        *_accuracy(run, measured),
        ("steps", f"{run.step or 0:,} of {run.last_step or 0:,}{_speed(measured)}"),
        *_time(totals),
        *_restarts(folder, totals),
        *([("warning", f"{_clock(run.warned_at)}: {run.warning}")] if run.warning and run.warned_at else []),
        *_places(folder),
        *_next(folder, complete),
    ]
    title = f"{folder.path}: {'DONE' if complete else 'STOPPED'}"
    return "\n".join([title, *(f"  {name:<12}{text}" for name, text in lines)])


def _accuracy(run: Run, measured: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    last = next((line for line in reversed(measured) if "val/top1" in line), None)
    if run.best_top1 is None or last is None:
        yield "loss", f"{run.loss:.4f}, of training" if run.loss is not None else NONE
        return
    of = "ema_" if "val/ema_top1" in last else ""
    beside = f", top-5 {last[f'val/{of}top5']:.2f} %, loss {last[f'val/{of}loss']:.4f}"
    if last["step"] == run.best_step:
        yield "top-1", f"{run.best_top1:.2f} % at step {run.best_step:,}, the best{beside}"
    else:
        yield "top-1", f"{run.best_top1:.2f} % at step {run.best_step:,}, the best"
        yield "", f"{judged_top1(last):.2f} % at step {last['step']:,}, the newest{beside}"
    if of:
        yield (
            "",
            (
                f"of the averaged weights; of the weights themselves {last['val/top1']:.2f} % at step "
                f"{last['step']:,}, top-5 {last['val/top5']:.2f} %, loss {last['val/loss']:.4f}"
            ),
        )


def _speed(measured: Sequence[Mapping[str, Any]]) -> str:
    rates = [line["speed/images_per_s"] for line in measured if "speed/images_per_s" in line]
    return f", {statistics.median(rates):,.0f} images/s in the median" if rates else ""


def _time(totals: LedgerTotals) -> Iterator[tuple[str, str]]:
    """Says where the time went, the largest part first, and what would do about one that is large."""
    away = f", and {duration(totals.away_s)} between its starts" if totals.restarts > 0 else ""
    yield "time", f"{duration(totals.wall_s)}{away}"
    yield "goodput", f"{share(totals.goodput):<7}steps that count"
    for name, of in totals.lost().items():
        if of >= 0.0005:
            remedy = f": {_REMEDIES[name]}" if of >= _SLOW and name in _REMEDIES else ""
            yield "", f"{share(of):<7}{name}{remedy}"


def _restarts(folder: RunFolder, totals: LedgerTotals) -> Iterator[tuple[str, str]]:
    found = restarts(folder)
    yield "restarts", f"{len(found) or 'none'}, {counted(totals.steps_redone, 'step')} made twice"
    if len(found) > _RESTARTS:
        yield "", f"… {len(found) - _RESTARTS} before these"
    for restart in found[-_RESTARTS:]:
        why = restart.why if len(restart.why) < 200 else f"{restart.why[:199]}…"
        yield "", f"at step {restart.step:,}, {_clock(restart.at)}: {why}"


def _places(folder: RunFolder) -> Iterator[tuple[str, str]]:
    weights = [str(path) for which in MODELS if (path := folder.model(which)).exists()]
    if weights:
        yield "weights", ", ".join(weights)
    yield "checkpoints", str(folder.checkpoints)
    yield "curves", f"{folder.metrics}, and in TensorBoard"
    yield "logs", str(folder.logs)


def _next(folder: RunFolder, complete: bool) -> Iterator[tuple[str, str]]:
    run = shlex.quote(str(folder.path))
    if not complete:
        yield "next", f"the same command again, or: python launch/status.py resume {run}"
        return
    yield "next", f"python -m crate_dist.evaluate {run}"
    yield "", f"python -m crate_dist.probe knn {run}"
    yield "", f"python -m crate_dist.figures attention {run} --images DIR --out figures"
    for line in how_to_watch(folder):
        yield "", line


def _clock(at: float | None) -> str:
    return time.strftime("%a %H:%M", time.localtime(at))
