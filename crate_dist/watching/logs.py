"""Shows the logs of a run: the sentence that matters first, then the end of the log, then what comes."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

from crate_dist.errors import UserError
from crate_dist.launching.showing import show
from crate_dist.run.folder import RunFolder
from crate_dist.run.rank_logs import rank_logs
from crate_dist.watching.history import batch_log
from crate_dist.watching.runs import Queue, look

_LINE_BYTES = 4096  # of a log's lines, the most that are counted on
_POLL_S = 0.5
_LOOK_S = 5.0  # for a log that took the place of this one, or a newer job's


class Shown(NamedTuple):
    """How far a log has been shown."""

    log: Path
    end: int
    """bytes of it, from its beginning"""


def show_logs(path: Path, queue: Queue, rank: int | None, lines: int) -> Shown:
    """Prints what has become of a run, and the last lines of a log, of its newest start where that can be told.

    rank: whose log; None: the batch script's, which rank 0 writes too, or without SLURM rank 0's
    Returns how far the log was shown, for follow to go on there.
    Raises UserError: there is no such log.
    """
    log = _log(RunFolder(path), rank)
    run = look(path, queue, disk=False)
    show(f"{run.run}: {run.state.upper()}: {run.reason or run.why or 'at work'}")
    if log is None:
        there = len(rank_logs(RunFolder(path)))
        what = f"no log of rank {rank}, but those of {there} ranks, from 0 on" if there and rank else "no log yet"
        raise UserError(f"{path} has {what}")
    show(f"==> {log} <==")
    with log.open("rb") as file:
        at = max(file.seek(0, os.SEEK_END) - lines * _LINE_BYTES, 0)
        file.seek(at)
        end = file.read().splitlines(keepends=True)[1 if at else 0 :][-lines:]
        begins = [place for place, line in enumerate(end) if line.startswith(b"crate-dist start ")]
        _print(b"".join(end[begins[-1] if begins else 0 :]))
        return Shown(log, file.tell())


def follow(path: Path, rank: int | None, shown: Shown) -> None:
    """Prints what a log grows by, as `tail -F` does, and goes on with the log of the next start. Never returns.

    shown: where to go on
    """
    folder = RunFolder(path)
    log, at = shown
    looked = time.monotonic()
    while True:
        if time.monotonic() - looked > _LOOK_S:
            looked, newest = time.monotonic(), _log(folder, rank)
            if newest and newest != log:
                show(f"==> {newest} <==")
                log, at = newest, 0
        if log.exists():
            with log.open("rb") as file:  # anew each time: on NFS that is what shows how it has grown
                at = file.seek(at if at <= os.fstat(file.fileno()).st_size else 0)
                _print(file.read())
                at = file.tell()
        time.sleep(_POLL_S)


def _print(text: bytes) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()


def _log(folder: RunFolder, rank: int | None) -> Path | None:
    own = folder.log_file(rank or 0)
    batch = batch_log(folder) if rank is None else None
    if batch and not (own.exists() and own.stat().st_mtime > batch.stat().st_mtime + 60):  # later, without SLURM
        return batch
    return own if own.exists() else None
