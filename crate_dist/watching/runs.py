"""What there is to know of a run, from its folder and, where there is one, from SLURM's queue. Writes nothing.

A run folder alone tells how far a run is, who works there, and how it ended. The queue adds what waits, and why.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from crate_dist.run.checkpoints import checkpoint_names
from crate_dist.run.folder import RunFolder
from crate_dist.run.holder import Holder, newest_holder
from crate_dist.slurm.queue import NoAnswer, QueuedJob, is_here, my_jobs
from crate_dist.watching import history

State = Literal["done", "running", "waiting", "stopped", "stuck", "failed"]

EXIT_STATUS: Mapping[State, int] = {"done": 0, "running": 10, "waiting": 11, "stopped": 12, "stuck": 20, "failed": 21}
"""Of launch/status.py; of several runs the highest. From 20 on somebody should look."""

STUCK_AFTER_S = 30 * 60.0
_MANIFEST = "manifest.json"
_SLACK_S = 15.0  # between the clocks of this machine and of the file server
_DISK_S = 2.0  # for which the sizes of a run's files are added up


@dataclass(frozen=True)
class Run:
    """A run at one moment. Times are seconds since 1970; None is what is not known (yet).

    state: see EXIT_STATUS; why: the state in a sentence; fault: why it failed, as the run itself said
    step, last_step, epoch, loss, images_per_s, data_wait_fraction, top1: the newest; top1 and best_top1 in per cent
    left_s: until the last step, evaluations and saves among them; progress_at: when something was written last
    where: the machines, or the process, that work on it; disk_used: bytes, at least so many if not disk_whole
    """

    run: Path
    name: str
    arch: str
    data: str
    state: State
    why: str
    looked_at: float
    fault: str = ""
    job: str | None = None
    job_state: str | None = None
    job_left: str | None = None
    where: str | None = None
    launcher: str | None = None
    world_size: int | None = None
    began_at: float | None = None
    started_at: float | None = None
    restarts: int = 0
    progress_at: float | None = None
    step: int | None = None
    last_step: int | None = None
    epoch: float | None = None
    epochs: int | None = None
    loss: float | None = None
    images_per_s: float | None = None
    data_wait_fraction: float | None = None
    top1: float | None = None
    ema_top1: float | None = None
    best_top1: float | None = None
    best_step: int | None = None
    left_s: float | None = None
    checkpoint_step: int | None = None
    checkpoint_at: float | None = None
    disk_used: int | None = None
    disk_whole: bool = True
    disk_free: int | None = None
    warning: str | None = None
    warned_at: float | None = None
    stop_requested: bool = False
    problems: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns the fields by name, as JSON has them: numbers that are none, as a loss may be, are None."""
        numbers = {key: None for key, value in asdict(self).items() if isinstance(value, float) and not isfinite(value)}
        return {**asdict(self), **numbers, "run": str(self.run)}

    @property
    def reason(self) -> str:
        """The fault, without what the state says before it."""
        return self.fault.removeprefix("FAILED: ")

    @property
    def is_over(self) -> bool:
        """Tells that nothing will happen unless somebody starts it."""
        return self.state in ("done", "stopped", "failed")


@dataclass(frozen=True)
class Queue:
    """SLURM's queue; jobs: by name and number; problem: why there are none to be seen, "" if that is how it is."""

    jobs: Mapping[str, QueuedJob]
    problem: str = ""

    @classmethod
    def asked(cls) -> Queue:
        """Asks SLURM once, where there is one."""
        if not is_here():
            return cls({}, "there is no SLURM on this machine to ask")
        try:
            jobs = my_jobs(patiently=False)
        except NoAnswer as error:
            return cls({}, f"SLURM does not answer: {' '.join(str(error).split())}")
        return cls({key: job for job in jobs for key in (job.number, job.name)})


def look(path: Path, queue: Queue, stuck_after_s: float = STUCK_AFTER_S, disk: bool = True) -> Run:
    """Looks at one run. One that cannot be read has failed, as far as can be told.

    disk: whether to add up what its files take, which can last seconds
    """
    try:
        return _look(RunFolder(path), queue, stuck_after_s, disk)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"it cannot be read: {type(error).__name__}: {error}"
        return Run(path, path.name, "?", "?", "failed", why, looked_at=time.time())


def _look(folder: RunFolder, queue: Queue, stuck_after_s: float, disk: bool) -> Run:
    path, problems = folder.path, list[str]()
    recipe = _read(folder.recipe_file, tomllib.loads, problems)
    starts: list[dict[str, Any]] = _read(folder.record_file, json.loads, problems).get("starts", [])
    times = [datetime.datetime.fromisoformat(start["time"]).timestamp() for start in starts]
    try:
        holder = holder_of(folder)
    except OSError as error:
        holder = None
        problems.append(f"cannot see who works there: {error}")
    job = job_of(folder, holder, queue)
    warning = history.last_warning(folder.log_file(0))
    bytes_used, whole = _size_of(path) if disk else (None, True)
    run = Run(
        run=path,
        name=path.name,
        arch=recipe.get("model", {}).get("arch", "?"),
        data=str(recipe.get("data", {}).get("root", "")),
        state="failed",
        why="",
        looked_at=time.time(),
        job=job.name if job else None,
        job_state=job.state if job else None,
        job_left=job.left if job and job.runs else None,
        where=((job.nodes if job and job.runs else "") or str(holder or "")) or None,
        launcher=starts[-1].get("launcher") if starts else None,
        world_size=starts[-1].get("world_size") if starts else None,
        began_at=times[0] if times else None,
        started_at=times[-1] if times else None,
        restarts=max(len(starts) - 1, 0),
        progress_at=history.last_event(folder).get("time"),
        epochs=recipe.get("train", {}).get("epochs"),
        disk_used=bytes_used,
        disk_whole=whole,
        disk_free=_free(path),
        warning=warning.text if warning else None,
        warned_at=warning.at if warning else None,
        stop_requested=os.path.exists(folder.stop_request),
    )
    try:
        run = _with_progress(run, folder, recipe)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        problems.append(f"cannot tell how far it is: {type(error).__name__}: {error}")
    state, why = _state(run, folder, holder, job, queue, stuck_after_s)
    fault = history.fault_of(folder, times[-1] if times else 0.0) if state == "failed" else ""
    why = "it ended with an error, and nothing will start it again" if fault else why
    return replace(run, state=state, why=why, fault=fault, problems=tuple(problems))


def _with_progress(run: Run, folder: RunFolder, recipe: Mapping[str, Any]) -> Run:
    names = checkpoint_names(folder.checkpoints)
    saved = next(filter(None, (_progress(folder.checkpoints / name) for name in reversed(names))), {})
    values = history.newest_values(folder, recipe["train"]["global_batch"], saved)
    run = replace(
        run,
        step=values.step,
        epoch=values.epoch,
        loss=values.loss,
        images_per_s=values.images_per_s,
        data_wait_fraction=values.data_wait_fraction,
        top1=values.top1,
        ema_top1=values.ema_top1,
        best_top1=values.best_top1,
        best_step=values.best_step,
    )
    if names:
        step, manifest = names[-1].partition("-")[2].partition(".")[0], folder.checkpoints / names[-1] / _MANIFEST
        run = replace(run, checkpoint_step=int(step), checkpoint_at=_written_at(manifest))
    if not values.samples:
        return run
    last = history.last_step(values.samples, recipe)
    left_s = history.seconds_left(folder, values, last, recipe["log"]["eval_every_epochs"])
    return replace(run, last_step=last, left_s=left_s)


def _state(
    run: Run, folder: RunFolder, holder: Holder | None, job: QueuedJob | None, queue: Queue, stuck_after_s: float
) -> tuple[State, str]:
    """Tells the state of a run, and says why, from what is known else of it."""
    complete = (
        run.last_step is not None and (run.checkpoint_step or 0) >= run.last_step and folder.model("last").exists()
    )
    if complete and not holder and (not job or job.state == "COMPLETING"):
        return "done", f"all {run.last_step:,} steps are made; weights in {folder.model('last').name}"
    if job and job.state == "SUSPENDED":
        return "running", "SLURM has suspended its job"
    by_log = history.job_by_its_log(folder) if queue.problem and _is_by_slurm(run, folder) else "over"
    if holder or (job and job.runs) or by_log == "runs":
        log = history.batch_log(folder)
        signs = (run.started_at, run.progress_at, _written_at(folder.recipe_file), job.started_at if job else None)
        idle_s = run.looked_at - max(sign or 0.0 for sign in (*signs, _written_at(log) if log else None))
        unseen = "" if holder or job else f"; its log says no end, and {queue.problem}"
        if idle_s > stuck_after_s:
            return "stuck", f"no step, evaluation or save for {idle_s / 60:.0f} minutes{unseen}"
        if run.stop_requested:
            return "running", f"it was asked to stop, and saves first{unseen}"
        if unseen:
            return "running", f"its ranks start or have just ended{unseen}"
        return "running", "" if (run.progress_at or 0) >= (run.started_at or 0) and run.step else "it is starting"
    if job:
        return "waiting", job.why
    if run.stop_requested:
        return "stopped", "it was asked to stop" + _saved(run)
    if by_log == "waits":
        return "waiting", f"in SLURM's queue, as far as its log says; {queue.problem}"
    if history.last_event(folder).get("event") == "end":
        return "stopped", "it was told to stop by a signal" + _saved(run)
    return "failed", "it ended without saying why: it, or its machine, was stopped from outside"


def _is_by_slurm(run: Run, folder: RunFolder) -> bool:
    """Tells whether a job of its own has worked in a folder last: not a launcher on some machine since."""
    log = history.batch_log(folder)
    since = log and run.started_at and (_written_at(log) or 0.0) < run.started_at
    return bool(folder.jobs()) and not (since and run.launcher != "slurm")


def _saved(run: Run) -> str:
    return "" if run.checkpoint_step is None else f", and has saved step {run.checkpoint_step:,}"


def _read(path: Path, parse: Callable[[str], dict[str, Any]], problems: list[str]) -> dict[str, Any]:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        problems.append(f"cannot read {path.name}: {error}")
        return {}


def _progress(checkpoint: Path) -> dict[str, Any]:
    """Reads what a checkpoint's manifest says of the run; nothing from one that is damaged, or being removed."""
    try:
        progress: dict[str, Any] = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))["progress"]
        return progress
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def holder_of(folder: RunFolder) -> Holder | None:
    """Returns who works in a folder, and is alive as far as can be told from here; launchers are not meant.

    Raises OSError when that cannot be seen.
    """
    found = newest_holder(folder.lock)
    if found is None or found[0].brief or found[0].surely_gone():
        return None
    holder, made_at = found
    fresh = time.time() - made_at < 2 * holder.lease_s + _SLACK_S
    return holder if holder.surely_alive() or fresh else None


def job_of(folder: RunFolder, holder: Holder | None, queue: Queue) -> QueuedJob | None:
    """Returns the job in the queue that works in a folder, or is to: the newest submitted for it, or the holder's."""
    for name in reversed(folder.jobs()):
        job = queue.jobs.get(name)
        # Not that of the folder which this one is a copy of.
        if job and (not job.script or Path(job.script).parent.resolve() == (folder.slurm / name).resolve().parent):
            return job
    return queue.jobs.get(holder.job) if holder else None


def _written_at(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _size_of(folder: Path) -> tuple[int, bool]:
    """Adds up the sizes of the files below a folder, and tells whether the time for that was enough."""
    total, until = 0, time.monotonic() + _DISK_S
    for place, _, names in os.walk(folder):
        for name in names:
            if time.monotonic() > until:
                return total, False
            with contextlib.suppress(OSError):  # a checkpoint that is being removed
                total += os.lstat(os.path.join(place, name)).st_size
    return total, True
