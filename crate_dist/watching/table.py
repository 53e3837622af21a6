"""How runs are shown: one in full, several as lines of a table."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from crate_dist.watching.runs import Run

_NONE = "–"


def in_full(run: Run) -> str:
    """Returns a paragraph on one run."""
    step = _NONE if run.step is None else f"{run.step:,}"
    if run.last_step:
        step += f" of {run.last_step:,} ({100 * (run.step or 0) / run.last_step:.1f} %)"
    if run.epoch is not None:
        step += f", epoch {run.epoch:.2f} of {run.epochs}"
    speed = _NONE if run.images_per_s is None else f"{run.images_per_s:,.0f} images/s"
    if run.data_wait_fraction is not None:
        speed += f", {run.data_wait_fraction:.0%} of the time waiting for data"
    top1 = _NONE if run.top1 is None else f"{run.top1:.2f} %"
    if run.best_top1 is not None:
        top1 += f", best {run.best_top1:.2f} % at step {run.best_step:,}"
    checkpoint = _NONE
    if run.checkpoint_step is not None:
        checkpoint = f"step {run.checkpoint_step:,}, {_ago(run, run.checkpoint_at)}"
    lines = {
        "why": run.why,
        "fault": run.fault,
        "on": _where(run),
        "step": f"{step}{'' if run.is_over else f', {_ago(run, run.progress_at)}'}",
        "speed": speed,
        "loss": _number(run.loss),
        "top-1": top1,
        "left": "" if run.is_over else _left(run),
        "restarts": f"{run.restarts}, the newest start {_ago(run, run.started_at)}" if run.restarts else "none",
        "checkpoint": checkpoint,
        "disk": _disk(run),
        "warning": f"{_ago(run, run.warned_at)}: {run.warning}" if run.warning and run.warning != run.fault else "",
        "but": "; ".join(run.problems),
    }
    title = f"{run.run}: {run.state.upper()}"
    return _printable("\n".join([title, *(f"  {name:<12}{text}" for name, text in lines.items() if text)]))


def as_table(runs: Sequence[Run]) -> str:
    """Returns a line for each of several runs, and below it why those that somebody should look at are so."""
    named = _named(runs)
    head = ("run", "state", "job", "step", "images/s", "loss", "top-1", "left", "restarts", "checkpoint")
    rows = [
        (
            name,
            run.state,
            run.job or _NONE,
            _share(run),
            f"{run.images_per_s:,.0f}" if run.images_per_s and run.state == "running" else _NONE,
            _number(run.loss),
            f"{run.top1:.2f} %" if run.top1 is not None else _NONE,
            duration(run.left_s) if run.left_s is not None and not run.is_over else _NONE,
            str(run.restarts),
            f"{run.checkpoint_step:,}" if run.checkpoint_step is not None else _NONE,
        )
        for name, run in named.items()
    ]
    reasons = [
        f"{name}: {run.fault or run.why}" for name, run in named.items() if run.state in ("stuck", "failed", "waiting")
    ]
    return _printable("\n".join([*_aligned([head, *rows]), *reasons]))


def as_list(runs: Sequence[Run]) -> str:
    """Returns a line for each run, of what it is rather than of how it does."""
    named = _named(runs)
    head = ("run", "state", "arch", "begun", "epochs", "steps", "best top-1", "disk", "data", "folder")
    rows = [
        (
            name,
            run.state,
            run.arch,
            time.strftime("%Y-%m-%d %H:%M", time.localtime(run.began_at)) if run.began_at else _NONE,
            f"{run.epochs}",
            _share(run),
            f"{run.best_top1:.2f} %" if run.best_top1 is not None else _NONE,
            ("" if run.disk_whole else "> ") + size(run.disk_used or 0),
            run.data or _NONE,
            str(run.run),
        )
        for name, run in named.items()
    ]
    return _printable("\n".join(_aligned([head, *rows])))


def _named(runs: Sequence[Run]) -> dict[str, Run]:
    """Names runs by what differs in their paths."""
    root = os.path.commonpath([run.run.parent for run in runs])
    return {os.path.relpath(run.run, root): run for run in runs}


def duration(seconds: float) -> str:
    """Says 3 d 04 h, 2 h 05 min, 7 min, 40 s."""
    minutes = int(max(seconds, 0) / 60)
    if minutes < 1:
        return f"{max(seconds, 0):.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24:02d} h"


def size(number: float) -> str:
    """Says 1.5 GB, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def _where(run: Run) -> str:
    job = f"job {run.job}, {(run.job_state or '').lower()}" if run.job else ""
    ranks = f"{run.world_size} ranks" if run.world_size and run.where else ""
    left = f"{run.job_left} of its time limit left" if run.job_left else ""
    return ", ".join(filter(None, [job, run.where, ranks, left]))


def _left(run: Run) -> str:
    if run.left_s is None:
        return _NONE
    end = time.strftime(": %a %H:%M", time.localtime(run.looked_at + run.left_s)) if run.state == "running" else ""
    return f"{duration(run.left_s)}, evaluations and saves among them{end}"


def _disk(run: Run) -> str:
    used = f"{'' if run.disk_whole else 'more than '}{size(run.disk_used)} used" if run.disk_used is not None else ""
    return ", ".join(filter(None, [used, f"{size(run.disk_free)} free" if run.disk_free is not None else ""]))


def _share(run: Run) -> str:
    if run.step is None:
        return _NONE
    return (
        f"{run.step:,}/{run.last_step:,} {100 * run.step / run.last_step:.0f} %" if run.last_step else f"{run.step:,}"
    )


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.4f}"


def _ago(run: Run, at: float | None) -> str:
    return _NONE if at is None else f"{duration(run.looked_at - at)} ago"


def _printable(text: str) -> str:
    """Leaves out what would command the terminal: a folder and a log may be anybody's."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
