"""Tells somebody of a run that is done, has failed for good, or is stuck: by a command of theirs, with JSON on stdin.

    CRATE_NOTIFY='mail -s "$CRATE_EVENT" me' python -m crate_dist.watching.notify done runs/crate_base
    CRATE_NOTIFY=… python -m crate_dist.watching.notify watch runs/crate_base --stuck-after 30

The command comes from a command line or the user's own settings, never from a run's files. What it does, and that it
fails or hangs, is said and changes nothing: the run does not wait for it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from crate_dist.arguments import positive
from crate_dist.run.folder import RunFolder
from crate_dist.watching.runs import Queue, look

Event = Literal["done", "failed", "stuck"]

VARIABLE = "CRATE_NOTIFY"
TIMEOUT_S = 60.0
_POLL_S = 30.0


def add_options(parser: argparse.ArgumentParser, mail: bool) -> None:
    """Adds --notify and --stuck-after, and --mail where SLURM sends it."""
    group = parser.add_argument_group("who is told", "never taken from a recipe or a run folder; see docs/watching.md")
    group.add_argument(
        "--notify",
        metavar="COMMAND",
        help="shell command to run once when the run is done, has failed for good, or is stuck; its standard input is "
        "what status.py --json says of the run, with `event` and `fault`",
    )
    group.add_argument(
        "--stuck-after",
        type=positive,
        metavar="MINUTES",
        default=30,
        help="with --notify: no step, evaluation or save for so long is a stall, told once [%(default)s]",
    )
    if mail:
        group.add_argument("--mail", metavar="USER", help="SLURM mails at the job's end, failure and requeue")


def tell(command: str, path: Path, event: Event, fault: str = "") -> str:
    """Runs the command with the run's JSON on its standard input; returns what became of it, never raises.

    After TIMEOUT_S the command is ended, with all that it has started; what it put behind `&` has that long too.
    """
    try:
        run = look(path, Queue({}))
        run = replace(run, state=event, fault=run.fault or fault)
        about = json.dumps({"event": event, **run.to_json()}) + "\n"
        process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=subprocess.PIPE,
            env={**os.environ, "CRATE_EVENT": event, "CRATE_RUN": str(path)},
            start_new_session=True,
        )
        until = time.monotonic() + TIMEOUT_S
        try:
            process.communicate(about.encode(), timeout=TIMEOUT_S)
            while _has_members(process.pid) and time.monotonic() < until:
                time.sleep(0.05)
            how = f"ended with {process.returncode}" if process.returncode else "succeeded"
        except subprocess.TimeoutExpired:
            how = f"took more than {TIMEOUT_S:.0f} s, and was ended"
        finally:
            if _has_members(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
                how = f"took more than {TIMEOUT_S:.0f} s, and was ended"
            process.wait()
    except Exception as error:  # whatever it is, the run is more important
        how = f"failed: {type(error).__name__}: {error}"
    return f"crate-dist: {event}: the --notify command {how}"


def _has_members(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _say(descriptor: int, text: str) -> None:
    """Writes a line. A log on a disk that is full says nothing, at the end of this process neither."""
    with contextlib.suppress(OSError):
        os.write(descriptor, f"{text}\n".encode())


class Stalls:
    """Knows how long a run has made no step, evaluation or save, by this machine's own clock; tells each stall once."""

    def __init__(self, path: Path, stuck_after_s: float) -> None:
        self._files = RunFolder(path).metrics, RunFolder(path).ledger
        self._stuck_after_s = stuck_after_s
        self._seen: list[int] = []
        self._since, self._told = time.monotonic(), False

    def is_new(self) -> bool:
        """Tells whether the run has just become one that is stuck."""
        sizes = []
        for path in self._files:
            with contextlib.suppress(OSError):
                sizes.append(path.stat().st_size)
        if sizes != self._seen:
            self._seen, self._since, self._told = sizes, time.monotonic(), False
        elif not self._told and time.monotonic() - self._since > self._stuck_after_s:
            self._told = True
            return True
        return False


def watch(command: str, path: Path, stuck_after_s: float, end: threading.Event, parent: int | None = None) -> None:
    """Tells of stalls until `end` is set.

    parent: a process without which this one has nothing to watch
    """
    stalls, pause_s = Stalls(path, stuck_after_s), min(_POLL_S, stuck_after_s / 4)
    while not end.wait(pause_s) and parent in (None, os.getppid()):
        if stalls.is_new():
            _say(2, tell(command, path, "stuck"))


@contextlib.contextmanager
def watched(command: str | None, path: Path, stuck_after_min: float) -> Iterator[None]:
    """Tells of stalls from a thread while the block runs, where there is a command to do that."""
    end = threading.Event()
    thread = threading.Thread(target=watch, args=(command, path, 60 * stuck_after_min, end), daemon=True)
    if command:
        thread.start()
    try:
        yield
    finally:
        end.set()


def main(argv: list[str] | None = None) -> int:
    """Tells of one event, or watches for stalls until its parent ends, as a batch script asks."""
    parser = argparse.ArgumentParser(
        "python -m crate_dist.watching.notify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("event", choices=["done", "failed", "stuck", "watch"])
    parser.add_argument("run", type=Path)
    parser.add_argument("--fault", default="", help="why it failed")
    parser.add_argument("--stuck-after", type=positive, default=30, metavar="MINUTES")
    arguments = parser.parse_args(argv)
    command = os.environ.pop(VARIABLE, "")
    if not command:
        parser.error(f"no command: {VARIABLE} is not set")
    if arguments.event == "watch":
        watch(command, arguments.run, 60 * arguments.stuck_after, threading.Event(), os.getppid())
    else:
        _say(1, tell(command, arguments.run, arguments.event, arguments.fault))
    return 0


if __name__ == "__main__":
    sys.exit(main())
