"""Stops runs: they save, end, and are not started again before a person does that.

The request stands in the run folder, where launchers, the batch script and rank 0 look for it, before anything is
signalled: whatever starts the ranks again after the signal finds it there.
"""

from __future__ import annotations

import contextlib
import datetime
import getpass
import json
import os
import platform
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from crate_dist.errors import UserError
from crate_dist.files import write_whole
from crate_dist.launching.showing import show
from crate_dist.run.folder import RunFolder
from crate_dist.terminal import complain
from crate_dist.watching.runs import Queue, holder_of, job_of, look

_POLL_S = 1.0


def stop(paths: Sequence[Path], wait: bool) -> int:
    """Stops runs, and says of each what was done. Returns the exit status: 1 when one could not be told.

    All are asked before the first is signalled, and each whose signal is refused still finds the request.

    wait: until all are saved
    """
    queue, asked, status = Queue.asked(), list[Path](), 0
    for path in paths:
        run = look(path, queue, disk=False)
        if run.state in ("done", "stopped") or run.fault:
            show(f"{path}: nothing to stop: it is {run.state}; {run.why}")
            continue
        try:
            _ask(run.run)
            asked.append(run.run)
        except UserError as error:
            status = _complain(path, error)
    for path in asked:
        try:
            show(f"{path}: {_tell(path, Queue.asked())}")  # one that waited may have begun, and one that ran have ended
        except UserError as error:
            status = _complain(path, error)
    while wait and asked:
        time.sleep(_POLL_S)
        queue = Queue.asked()
        for run in [look(path, queue, disk=False) for path in asked]:
            if run.is_over:
                asked.remove(run.run)
                show(f"{run.run}: {run.state}: {run.why}")
    return status


def _complain(path: Path, error: UserError) -> int:
    complain(f"{path}: {error}")
    return 1


def _ask(path: Path) -> None:
    """Puts the request down. Raises UserError when the folder cannot be written."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    who = {"time": now, "user": getpass.getuser(), "host": platform.node(), "asked_by": "launch/status.py stop"}
    try:
        write_whole(RunFolder(path).stop_request, json.dumps(who) + "\n")
    except OSError as error:
        raise UserError(f"cannot put the request to stop down: {error.strerror}") from error


def _tell(path: Path, queue: Queue) -> str:
    """Signals whoever works there; returns what will happen. Raises UserError when SLURM refuses."""
    folder = RunFolder(path)
    holder = holder_of(folder)
    job = job_of(folder, holder, queue)
    if job and not job.runs:
        _slurm("scancel", job.name)
        return f"job {job.name}, which waited, is cancelled"
    if job and job.state == "SUSPENDED":
        return f"job {job.name} is suspended: once it is resumed it saves and ends"
    if job and job.state == "COMPLETING":
        return f"job {job.name} is ending"
    if job:
        if job.name in folder.jobs():
            with contextlib.suppress(UserError):  # for SLURM itself, and batch scripts that know of no request
                _slurm("scontrol", "update", f"JobId={job.name}", "Requeue=0")
        _slurm(
            "scancel",
            "--signal=USR2",
            job.name if job.name in folder.jobs() else f"{job.name}.{holder.step}" if holder else job.name,
        )
        return f"job {job.name} is told to save and to end"
    if holder and holder.surely_alive() and _is_ours(holder.pid):
        os.kill(holder.pid, signal.SIGTERM)
        return f"{holder} is told to save and to end"
    return f"asked to stop; {holder or 'its rank 0, should there be one,'} looks for that at its next report"


def _is_ours(pid: int) -> bool:
    """Tells whether a process is this program's: the lock of a folder from elsewhere can name any."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"crate_dist" in words or b"launch/local.py" in words


def _slurm(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"`{' '.join(command)}` did not answer: {error}; the request to stop is put down") from error
    if done.returncode:
        raise UserError(f"`{' '.join(command)}` failed: {done.stderr.strip()}; the request to stop is put down")
