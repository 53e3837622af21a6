"""Ranks that start in a second and can have a fault in them: `crate_dist.train`'s main in forked processes."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from crate_dist.world import free_port
from tests.chaos.faults import Fault
from tests.chaos.stacks import answer_with_stacks, leave_stacks
from tests.ranks import local_world, rank_environment

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the fork server, which reads it once
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["crate_dist.train", "tests.chaos.faults"])

_PR_SET_PDEATHSIG = 1
PATIENCE_S = 180.0
"""Far more than anything here takes, also on a machine that others use."""


_running: list[Ranks] = []


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Polls. Raises TimeoutError that says `what` did not happen, and where the stacks of all ranks are."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pids = [process.pid or 0 for ranks in _running for process in ranks.processes]
            left = f"; stacks in {leave_stacks(pids, _running[-1].notes)}" if _running else ""
            raise TimeoutError(f"no {what} within {timeout_s:.0f} s{left}")
        time.sleep(0.02)


class Ranks:
    """The ranks of one start of a run: each is `python -m crate_dist.train …` in all but the import of torch.

    faults: by rank; notes: a folder for what the ranks tell the tests
    """

    def __init__(
        self,
        arguments: Sequence[object],
        notes: Path,
        world_size: int = 2,
        faults: Mapping[int, Fault] | None = None,
        port: int | None = None,
    ) -> None:
        self.notes, self.faults = notes, dict(faults or {})
        notes.mkdir(parents=True, exist_ok=True)
        for fault in self.faults.values():
            fault.mark(notes).unlink(missing_ok=True)
        port = port or free_port()
        self.processes = [
            _CONTEXT.Process(
                target=_rank, args=(list(map(str, arguments)), rank, world_size, port, notes, self.faults.get(rank))
            )
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()
        _running.append(self)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def running(self) -> list[int]:
        """Ranks that have not ended."""
        return [rank for rank, process in enumerate(self.processes) if process.is_alive()]

    def wait(self, timeout_s: float = PATIENCE_S) -> list[int | None]:
        """The exit status of each rank, once all have ended."""
        wait_until(lambda: not self.running(), f"end of ranks {self.running()}", timeout_s)
        return [process.exitcode for process in self.processes]

    def wait_for_fault(self, rank: int) -> int:
        """The process in which the fault of a rank has struck: the rank's own, or a loader worker's."""
        mark = self.faults[rank].mark(self.notes)
        wait_until(lambda: mark.exists() or not self.running(), f"fault {self.faults[rank].point}")
        assert mark.exists(), f"{self.faults[rank].point} was never reached:\n{self.output(0)}"
        return int(mark.read_text())

    def kill(self, rank: int) -> None:
        """kill -9 of the rank alone: its loader workers have to notice."""
        pid = self.processes[rank].pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        """kill -9 of all ranks, loader workers included."""
        if self in _running:
            _running.remove(self)
        for process in self.processes:
            assert process.pid is not None
            for kill in os.killpg, os.kill:  # one that has just been forked leads no group yet
                with contextlib.suppress(ProcessLookupError):
                    kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()

    def output(self, rank: int) -> str:
        """Returns what a rank printed, in all its starts."""
        path = _output(self.notes, rank)
        return path.read_text(errors="replace") if path.exists() else ""


def spawn_statuses(
    function: Callable[..., None], world_size: int, folder: Path, wait_for: int | None = None
) -> list[int | None]:
    """Calls function(world, device, folder) on gloo ranks that may end badly; the exit status of each.

    wait_for: the one rank that ends by itself; None: all do
    """
    port = free_port()
    processes = [
        _CONTEXT.Process(target=_call, args=(function, rank, world_size, port, folder)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes if wait_for is None else [processes[wait_for]]:
            process.join(PATIENCE_S)
    finally:
        for process in processes:
            process.kill()
    return [process.exitcode for process in processes]


def _call(function: Callable[..., None], rank: int, world_size: int, port: int, folder: Path) -> None:
    from crate_dist.distributed import init_distributed

    os.environ.update(rank_environment(rank, world_size, port))
    world = local_world(rank, world_size, port)
    function(world, init_distributed(world), folder)
    os._exit(0)


def _output(notes: Path, rank: int) -> Path:
    return notes / f"output-{rank}"


def _rank(arguments: list[str], rank: int, world_size: int, port: int, notes: Path, fault: Fault | None) -> None:
    import torch

    from crate_dist import train
    from crate_dist.run.exit_status import STOPPED
    from crate_dist.training.interrupt import ToldToStop
    from tests.chaos.faults import note_samples

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # the fork server ends with the tests
    os.setsid()
    with _output(notes, rank).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    answer_with_stacks(notes / f"stacks-{rank}")
    os.environ.update(rank_environment(rank, world_size, port), CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    note_samples(notes / f"samples-{rank}")
    if fault:
        fault.install(notes)
    status = 1
    try:
        status = train.main(arguments)
    except ToldToStop:
        status = STOPPED
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)  # without what multiprocessing does at the end of its children and no rank does at its own
