"""What the files of a run folder say last: its newest values, the time that is left, its warnings, its faults.

Of files that grow, only the ends are read, backwards; a line that is half written or damaged is passed over.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from crate_dist.files import lines_backwards, whole_lines
from crate_dist.run.checkpoints import judged_top1
from crate_dist.run.folder import RunFolder
from crate_dist.run.rank_logs import Said, rank_logs, said_backwards

_REPORTS = 50  # over which speed is averaged
_EVENTS = 2000  # of the ledger, in which an evaluation and saves are looked for
_LOG_END = 1 << 20
_FAULT = re.compile(r"crate-dist (?:fault|lost): (.*)")
_VERDICT = re.compile(r"crate-dist: ((?:FAILED|GIVEN UP): .*|ended with status .*, and not requeued: .*)")

_JOB_ENDED = re.compile(
    r"crate-dist: (?:stopped|not started), |"
    r"slurmstepd: error: \*\*\* JOB .* CANCELLED AT \S+ (?:DUE TO TIME LIMIT )?\*\*\*"
)


@dataclass(frozen=True)
class Values:
    """The newest values of a run; None for what it has not measured.

    epoch: of `step`; steps_per_epoch: not rounded; top1, best_top1: per cent; ema_top1: of the average of the weights;
    samples: images of an epoch, order.repeats of each
    """

    step: int | None = None
    epoch: float | None = None
    steps_per_epoch: float | None = None
    loss: float | None = None
    images_per_s: float | None = None
    data_wait_fraction: float | None = None
    top1: float | None = None
    ema_top1: float | None = None
    best_top1: float | None = None
    best_step: int | None = None
    samples: int | None = None


def newest_values(folder: RunFolder, global_batch: int, saved: dict[str, Any]) -> Values:
    """Reads the newest values of metrics.jsonl, and of what was evaluated before the newest checkpoint from there.

    saved: the progress in that checkpoint's manifest
    Raises OSError when the file is there and cannot be read.
    """
    report: dict[str, Any] = {}
    evaluations: list[dict[str, Any]] = []
    for line in _objects(lines_backwards(folder.metrics)):
        if "train/loss" in line and not report:
            report = line
        if "val/top1" in line:
            evaluations.append(line)
        if report and int(line.get("step", 0)) <= int(saved.get("step", -1)):
            break  # what is further up, the checkpoint knows
    before = {"val/top1": saved.get("best_top1", -1.0), "step": saved.get("best_step", -1)}
    best = max([before, *reversed(evaluations)], key=judged_top1)
    last = evaluations[0] if evaluations else saved.get("metrics", {})
    epoch = report.get("train/epoch")
    samples = round(report["step"] * global_batch / epoch) if epoch else None
    return Values(
        step=report.get("step", saved.get("step")),
        epoch=epoch,
        steps_per_epoch=samples / global_batch if samples else None,
        loss=report.get("train/loss"),
        images_per_s=report.get("speed/images_per_s"),
        data_wait_fraction=report.get("speed/data_wait_fraction"),
        top1=last.get("val/top1"),
        ema_top1=last.get("val/ema_top1"),
        best_top1=judged_top1(best) if best["step"] >= 0 else None,
        best_step=best["step"] if best["step"] >= 0 else None,
        samples=samples,
    )


def metrics_lines(folder: RunFolder) -> list[dict[str, Any]]:
    """Reads all lines of metrics.jsonl, the first one first. Raises OSError when that cannot be."""
    return list(_objects(whole_lines(folder.metrics)))


def last_step(samples: int, recipe: Mapping[str, Any]) -> int:
    """Returns the step at which a run over `samples` images is complete, by the values of its recipe."""
    train = recipe["train"]
    total: int = -(-train["epochs"] * samples // train["global_batch"])
    return min(total, train.get("max_steps") or total)


def seconds_left(folder: RunFolder, values: Values, last: int, eval_every_epochs: int) -> float | None:
    """Estimates the time until the last step: the newest steps, evaluations to come, and what saves and measures take.

    None: nothing is known of the speed yet.
    """
    if values.step is None or not values.steps_per_epoch:
        return None
    events = list(islice(_objects(lines_backwards(folder.ledger)), _EVENTS))
    newest_start = next((place for place, event in enumerate(events) if event.get("event") == "start"), len(events))
    reports = [event for event in events[:newest_start] if event.get("event") == "steps"]
    if len(reports) > 1 and newest_start < len(events):
        reports.pop()  # the first of a start has compiling in it
    reports = reports or [event for event in events if event.get("event") == "steps"]
    try:
        steps = sum(event["step"] - event["after"] for event in reports[:_REPORTS])
        step_s = sum(event["busy_s"] for event in reports[:_REPORTS]) / steps
        spans = [event["step"] - event["after"] for event in events if event.get("event") == "steps"]
        beside = [event.get("stall_s", 0.0) for event in events if event.get("event") == "save"]
        beside += [event["seconds"] for event in events if event.get("event") == "whitebox"]
        evaluations = [event["seconds"] for event in events if event.get("event") == "evaluation"][:5]
    except (KeyError, TypeError, ZeroDivisionError):
        return None
    step_s += math.fsum(beside) / max(sum(spans), 1)
    done, end = (int(step / values.steps_per_epoch + 1e-9) // eval_every_epochs for step in (values.step, last))
    evaluation_s = statistics.mean(evaluations) if evaluations else 0.0
    return max(last - values.step, 0) * step_s + max(end - done, 0) * evaluation_s


def last_warning(log: Path) -> Said | None:
    """Finds the last warning or error near the end of a rank's log."""
    return next(said_backwards(log, "WEC", _LOG_END), None)


def fault_of(folder: RunFolder, since: float) -> str:
    """Finds the sentence that says why a run ended; "" when nobody said anything.

    since: only what was said after this time counts, of logs in which older starts may have said something
    """
    jobs = folder.jobs()
    if jobs:
        logs = sorted((folder.slurm / jobs[-1]).glob("*_log.out"))
        for path in logs:
            if verdict := _last(path, _VERDICT):
                return verdict
        for path in logs:
            if fault := _last(path, _FAULT):
                return fault
    newest = (said for log in rank_logs(folder) for said in islice(said_backwards(log, "EC", _LOG_END), 1))
    errors = [said for said in newest if said.at >= since]
    return max(errors, key=lambda said: said.at).text if errors else ""


def job_by_its_log(folder: RunFolder) -> Literal["waits", "runs", "over"]:
    """Tells what has become of the newest job as far as its log says: whether it is in the queue, or has not ended."""
    log = batch_log(folder)
    if log is None:
        return "waits" if folder.jobs() else "over"
    for line in lines_backwards(log, _LOG_END):
        if line.startswith("crate-dist: ended with status") and line.endswith("requeueing"):
            return "waits"
        if _VERDICT.match(line) or _JOB_ENDED.match(line):
            return "over"
        if line.startswith("crate-dist start "):
            return "runs"
    return "over"


def last_event(folder: RunFolder) -> dict[str, Any]:
    """Reads the last line of the ledger: a start, steps, an evaluation, a save, or "end", of a start that has saved."""
    return next(_objects(lines_backwards(folder.ledger)), {})


def batch_log(folder: RunFolder) -> Path | None:
    """Returns the log of the newest SLURM job's batch script and rank 0; None where there is none yet."""
    jobs = folder.jobs()
    logs = sorted((folder.slurm / jobs[-1]).glob(f"{jobs[-1]}_0_log.out")) if jobs else []
    return logs[0] if logs else None


def _last(log: Path, pattern: re.Pattern[str]) -> str:
    """Finds what the newest start in a log says; the batch script, and each rank, begin one with a line."""
    for line in lines_backwards(log, _LOG_END):
        if match := pattern.match(line):
            return match[1]
        if line.startswith("crate-dist start "):
            return ""
    return ""


def _objects(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found
