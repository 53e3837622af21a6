"""Many processes that work off a stream of tasks, for programs that a person watches and may stop.

What the standard pool leaves open: progress from within a task, Ctrl-C that lets workers clean up, no hang and no
orphans when a worker or the program itself is killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from tqdm import tqdm

from crate_dist.data.index import ShardError

Task = TypeVar("Task")
Result = TypeVar("Result")
_TICK_S = 0.2
_FIRST = 2  # in the shared array: [0] is set to stop, [1] hands out the places from [2] on


class Stopped(Exception):
    """The program is about to end; advance() raises it within a task."""


class _Worker:
    """The memory that a worker process shares with the program. No locks: a killed process would keep one for ever."""

    shared: Any = None
    number = 0


def run_parallel(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int, bar: tqdm[Any]
) -> Iterator[Result]:
    """Yields results in the order in which they are ready; takes tasks from the iterable as they can be worked on.

    `function` is a module's function and calls advance(n) now and then, which moves the bar. The first exception
    ends all work: tasks in progress get Stopped from their next advance(), and have ended when it is raised here; the
    same goes for KeyboardInterrupt. Raises ShardError when a worker process dies.
    """
    context = multiprocessing.get_context("spawn")
    shared = context.RawArray("q", _FIRST + workers)
    places = context.Value("i", _FIRST)
    pool = ProcessPoolExecutor(workers, context, _begin, (shared, places))
    pending: set[Future[Result]] = set()
    shown = 0
    upcoming = iter(tasks)
    try:
        while True:
            for task in islice(upcoming, 2 * workers - len(pending)):
                with _interrupts_held():
                    pending.add(pool.submit(function, task))
            if not pending:
                return
            done, pending = wait(pending, _TICK_S, FIRST_COMPLETED)
            progress = sum(shared[_FIRST:])
            bar.update(progress - shown)
            shown = progress
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise ShardError(
            "a worker process was killed, perhaps for want of memory; what is finished is kept, so the same command "
            "continues, also with fewer --workers"
        ) from error
    finally:
        shared[0] = 1
        _end(pool)


def advance(number: int) -> None:
    """Tells the program that a task got on by `number`. Raises Stopped when it is to end early."""
    if _Worker.shared is not None:
        _Worker.shared[_Worker.number] += number
        if _Worker.shared[0]:
            raise Stopped


def _begin(shared: Any, places: Any) -> None:
    with places.get_lock():
        _Worker.number = places.value
        places.value += 1
    _Worker.shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the program tells the workers
    # webdataset runs without torch, and each worker saves two seconds and a few hundred MB by not importing it.
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _end(pool: ProcessPoolExecutor) -> None:
    try:
        pool.shutdown(cancel_futures=True)
    except KeyboardInterrupt:  # once more: do not wait for a worker that waits for a disk
        for process in multiprocessing.active_children():
            process.kill()
        pool.shutdown()
        raise


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Blocks SIGINT for workers that start within, which inherit that until they are set up to ignore it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
