"""Runs ranks as processes of this machine: all of them end well, or all of them end. Imports no torch."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from crate_dist.errors import UserError
from crate_dist.run.exit_status import STOPPED
from crate_dist.run.folder import RunFolder
from crate_dist.world import World, free_port

STOP_GRACE_S = 60.0
"""Seconds for the ranks after a Ctrl-C or SIGTERM, which every rank gets; a second one ends them at once."""
SIBLING_GRACE_S = 5.0
"""Seconds for the other ranks after the death of one: without it they can save nothing any more."""
_PR_SET_PDEATHSIG = 1
_SAYS_WHY = re.compile(r"error: |([\w.]+\.)?[A-Z]\w*(Error|Exception|Timeout|Failed|NotFinite|LostTheRun|Interrupt)\b")
"""The line of a program's refusal, or the last one of a traceback."""
_GPU_NAME = re.compile(r"\d+|(GPU|MIG)-[\w/-]+")


class RankFailed(UserError):
    """A rank ended badly and took the others with it; the message has what its log says of the reason."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Returns the variables by which world.detect_world knows a local rank, and its share of the cores."""
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // ranks))
    world = World(rank, ranks, rank, ranks, "127.0.0.1", port, "local")
    return {**world.environment(), "OMP_NUM_THREADS": threads}


def visible_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """Counts the GPUs that a rank will be able to see, without importing torch.

    As CUDA reads CUDA_VISIBLE_DEVICES: numbers or UUIDs, up to the first name that means no GPU. Of the parts of a GPU
    (MIG) a process can use one.
    """
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        names = list(itertools.takewhile(_GPU_NAME.fullmatch, map(str.strip, chosen.split(","))))
        return 1 if any(name.startswith("MIG-") for name in names) else len(names)
    if shutil.which("nvidia-smi"):
        try:
            listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout
        except (OSError, subprocess.TimeoutExpired):
            return 0
        return 1 if re.search(r"^\s+MIG ", listing, re.MULTILINE) else len(re.findall(r"^GPU ", listing, re.MULTILINE))
    return len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])


def run_ranks(
    command: Sequence[str], ranks: int, folder: RunFolder, environment: Mapping[str, str] | None = None
) -> None:
    """Runs `command` as every rank, with more variables in its environment, and returns when all have ended well.

    Rank 0 speaks to the terminal; what the others print goes to their logs. Ctrl-C, SIGTERM and SIGHUP reach the
    ranks as SIGTERM. No rank outlives this process, not even when it is killed.

    Raises
    ------
    RankFailed: a rank ended with an error or by a signal, and the others were ended
    KeyboardInterrupt, SystemExit: the ranks ended because this process was told to stop
    """
    port = free_port()
    processes: list[subprocess.Popen[bytes]] = []
    begins = [_size(folder.log_file(rank)) for rank in range(ranks)]
    with _signals() as caught:
        try:
            for rank in range(ranks):
                variables = {**rank_environment(rank, ranks, port), **(environment or {})}
                processes.append(_start(command, rank, variables, folder.log_file(rank)))
            failed = _wait(processes, caught)
        finally:
            _kill(processes)
    if caught and any(process.returncode for process in processes):
        raise KeyboardInterrupt if caught[0] == signal.SIGINT else SystemExit(128 + caught[0])
    if failed is not None:
        raise _explain(failed, processes[failed].returncode, folder.log_file(failed), begins[failed])


def _start(command: Sequence[str], rank: int, variables: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=None if rank == 0 else file,
            stderr=None if rank == 0 else file,
            # A group for the rank and its loader workers: a Ctrl-C reaches them through this process alone.
            process_group=0,
            preexec_fn=ending_with_parent(),
        )


def ending_with_parent() -> Callable[[], None]:
    """Returns what a process, begun by this thread, calls so that the kernel kills it when this one has ended."""
    return functools.partial(_end_with, os.getpid())


def _end_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)


def _wait(processes: Sequence[subprocess.Popen[bytes]], caught: Sequence[int]) -> int | None:
    """Waits for all to end, as signals or the death of one may have it; returns the first that ended badly."""
    failed: int | None = None
    told_to_stop = False
    deadline = float("inf")
    while True:
        running = [process for process in processes if process.poll() is None]
        if failed is None:
            failed = next((rank for rank, process in enumerate(processes) if process.returncode), None)
            if failed is not None and not caught:
                _send(running, signal.SIGTERM)
                asked = processes[failed].returncode == STOPPED  # the others close their files
                deadline = time.monotonic() + (STOP_GRACE_S if asked else SIBLING_GRACE_S)
        if caught and not told_to_stop:
            # Not SIGINT: an exception somewhere within a step leaves the other ranks waiting in a collective.
            _send(running, signal.SIGTERM)
            told_to_stop, deadline = True, min(deadline, time.monotonic() + STOP_GRACE_S)
        if not running or len(caught) > 1 or time.monotonic() > deadline:
            return failed
        time.sleep(0.05)


def _send(processes: Sequence[subprocess.Popen[bytes]], signum: int) -> None:
    for process in processes:
        process.send_signal(signum)


def _kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends what is left of every rank's group, loader workers included."""
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    for process in processes:
        process.wait()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects the signals that come in meanwhile, instead of their usual effect."""
    caught: list[int] = []

    def remember(signum: int, frame: FrameType | None) -> None:
        caught.append(signum)

    before = {}
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:  # as under nohup
            before[signum] = signal.signal(signum, remember)
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _explain(rank: int, status: int, log: Path, begin: int) -> RankFailed:
    """Says in a sentence how a rank ended and why, and where its log is, of which this start's part is at `begin`."""
    if rank == 0 and status == 1:  # it has said on the terminal what a person can do
        return RankFailed("rank 0 ended with exit status 1, for the reason above, so the others were ended", status)
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
    said = log.read_bytes() if log.is_file() else b""
    before, lines = said[:begin].count(b"\n"), said[begin:].decode(errors="replace").splitlines()
    why = next((line.removeprefix("error: ") for line in reversed(lines) if _SAYS_WHY.match(line)), "")
    if not why and status == -signal.SIGKILL:
        why = "by somebody, or by the kernel for want of memory, as `dmesg -T` would say"
    elif not why and status > 0 and lines:
        why = lines[-1]
    text = f"rank {rank} {how}{f' ({why})' if why else ''}, so the others were ended; what it said stands in {log}"
    text += f" from line {before + 1} on" if before else ""
    return RankFailed(text, 128 - status if status < 0 else status)
