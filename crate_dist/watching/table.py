"""How runs are shown: one in full, several as lines of a table."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence

from crate_dist.terminal import Style, paint
from crate_dist.watching.runs import Run, State
from crate_dist.wording import NONE, aligned, duration, share, size

_STYLES: Mapping[State, Style] = {
    "done": "green",
    "running": "green",
    "waiting": "yellow",
    "stopped": "yellow",
    "stuck": "red",
    "failed": "red",
}


def in_full(run: Run) -> str:
    """Returns a paragraph on one run."""
    step = NONE if run.step is None else f"{run.step:,}"
    if run.last_step:
        step += f" of {run.last_step:,} ({100 * (run.step or 0) / run.last_step:.1f} %)"
    if run.epoch is not None:
        step += f", epoch {run.epoch:.2f} of {run.epochs}"
    speed = NONE if run.images_per_s is None else f"{run.images_per_s:,.0f} images/s"
    if run.data_wait_fraction is not None:
        speed += f", {share(run.data_wait_fraction)} of the time waiting for data"
    top1 = NONE if run.top1 is None else f"{run.top1:.2f} %"
    if run.ema_top1 is not None:
        top1 += f", of the averaged weights {run.ema_top1:.2f} %"
    if run.best_top1 is not None:
        top1 += f", best {run.best_top1:.2f} % at step {run.best_step:,}"
    checkpoint = NONE
    if run.checkpoint_step is not None:
        checkpoint = f"step {run.checkpoint_step:,}, {_ago(run, run.checkpoint_at)}"
    lines = {
        "why": run.why,
        "fault": run.reason,
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
    title = f"{run.run}: {paint(run.state.upper(), _STYLES[run.state])}"
    return "\n".join([title, *(_printable(f"  {name:<12}{text}") for name, text in lines.items() if text)])


def as_table(runs: Sequence[Run]) -> str:
    """Returns a line for each of several runs, and below it why those that somebody should look at are so."""
    named = _named(runs)
    head = ("run", "state", "job", "step", "images/s", "loss", "top-1", "left", "restarts", "checkpoint")
    rows = [
        (
            name,
            run.state,
            run.job or NONE,
            _share(run),
            f"{run.images_per_s:,.0f}" if run.images_per_s and run.state == "running" else NONE,
            _number(run.loss),
            f"{run.top1:.2f} %" if run.top1 is not None else NONE,
            duration(run.left_s) if run.left_s is not None and not run.is_over else NONE,
            str(run.restarts),
            f"{run.checkpoint_step:,}" if run.checkpoint_step is not None else NONE,
        )
        for name, run in named.items()
    ]
    reasons = [
        f"{name}: {run.reason or run.why}" for name, run in named.items() if run.state in ("stuck", "failed", "waiting")
    ]
    return "\n".join([*_lines(head, rows, runs), *map(_printable, reasons)])


def as_list(runs: Sequence[Run]) -> str:
    """Returns a line for each run, of what it is rather than of how it does."""
    named = _named(runs)
    head = ("run", "state", "arch", "begun", "epochs", "steps", "best top-1", "disk", "data", "folder")
    rows = [
        (
            name,
            run.state,
            run.arch,
            time.strftime("%Y-%m-%d %H:%M", time.localtime(run.began_at)) if run.began_at else NONE,
            f"{run.epochs}",
            _share(run),
            f"{run.best_top1:.2f} %" if run.best_top1 is not None else NONE,
            ("" if run.disk_whole else "> ") + size(run.disk_used or 0),
            run.data or NONE,
            str(run.run),
        )
        for name, run in named.items()
    ]
    return "\n".join(_lines(head, rows, runs))


def _named(runs: Sequence[Run]) -> dict[str, Run]:
    """Names runs by what differs in their paths."""
    root = os.path.commonpath([run.run.parent for run in runs])
    return {os.path.relpath(run.run, root): run for run in runs}


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]], runs: Sequence[Run]) -> list[str]:
    """Returns a table with the second column, the state, in its colour."""
    first, *lines = map(_printable, aligned([head, *rows]))
    at = first.index(head[1], len(head[0]))
    states = (paint(run.state, _STYLES[run.state]) for run in runs)
    return [
        first,
        *(
            f"{line[:at]}{state}{line[at + len(run.state) :]}"
            for line, state, run in zip(lines, states, runs, strict=True)
        ),
    ]


def _where(run: Run) -> str:
    job = f"job {run.job}, {(run.job_state or '').lower()}" if run.job else ""
    ranks = f"{run.world_size} ranks" if run.world_size and run.where else ""
    left = f"{run.job_left} of its time limit left" if run.job_left else ""
    return ", ".join(filter(None, [job, run.where, ranks, left]))


def _left(run: Run) -> str:
    if run.left_s is None:
        return NONE
    end = time.strftime(": %a %H:%M", time.localtime(run.looked_at + run.left_s)) if run.state == "running" else ""
    return f"{duration(run.left_s)}, evaluations and saves among them{end}"


def _disk(run: Run) -> str:
    used = f"{'' if run.disk_whole else 'more than '}{size(run.disk_used)} used" if run.disk_used is not None else ""
    return ", ".join(filter(None, [used, f"{size(run.disk_free)} free" if run.disk_free is not None else ""]))


def _share(run: Run) -> str:
    if run.step is None:
        return NONE
    return f"{run.step:,}/{run.last_step:,} {share(run.step / run.last_step)}" if run.last_step else f"{run.step:,}"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def _ago(run: Run, at: float | None) -> str:
    return NONE if at is None else f"{duration(run.looked_at - at)} ago"


def _printable(text: str) -> str:
    """Leaves out what would command the terminal: a folder and a log may be anybody's."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
