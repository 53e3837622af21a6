"""Turns a signal into a flag, on which the ranks agree at a step boundary, or ends a rank where that loses nothing."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from crate_dist.distributed import Left, host_group
from crate_dist.run.exit_status import STOPPED

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
"""SIGUSR2: SLURM's warning as submitit asks for it; SIGTERM: preemption, time limit, Ctrl-C of a local launcher."""

_AGAIN_S = 1.0
"""The least time between two Ctrl-C: torchrun passes on one that its ranks have had from the terminal too."""


class ToldToStop(SystemExit):
    """Raised by a signal where nothing would be lost."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Lets a signal end this process, which waits for the others to come and has nothing to save.

    By a thread, since the main one may be waiting in a library that never comes back to Python.
    """

    def wait() -> None:
        if os.read(noted, 1):
            os._exit(STOPPED)

    noted, noting = os.pipe()
    os.set_blocking(noting, False)
    before_noting = signal.set_wakeup_fd(noting, warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    waiting = threading.Thread(target=wait, name="signals", daemon=True)
    waiting.start()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before_noting)
        os.close(noting)
        waiting.join()
        os.close(noted)


class Interrupt:
    """Knows whether any rank has been told to stop. A second Ctrl-C ends the process as if this were not there.

    `agreed` is a collective on a gloo group of its own, so that it neither waits for the device nor meets the
    collectives of the step. Each call starts a reduction and takes the result of the one before: no rank waits.

    received_at: when this rank was told, by time.monotonic(); by_slurm: whether that was SLURM's warning before the end
    elsewhere: whether another rank was, as far as this one has heard; what can be left before its end goes by `heard`,
        which is not the same on all ranks
    """

    def __init__(self) -> None:
        self.received_at: float | None = None
        self.by_slurm = False
        self.elsewhere = False
        self._at_once = self._came = False
        self._interrupted_at: float | None = None
        self._group = host_group()
        self._before: dict[int, object] = {}
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def __enter__(self) -> Interrupt:
        self._noted, noting = os.pipe()
        for end in (self._noted, noting):
            os.set_blocking(end, False)
        self._before_noting = signal.set_wakeup_fd(noting, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._set) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        os.close(signal.set_wakeup_fd(self._before_noting))
        os.close(self._noted)

    def came(self) -> bool:
        """Says whether this rank was told, to another thread than the main one.

        Python's handler runs in the main thread, when a collective that it waits in has ended; a signal is noted in a
        pipe at once.
        """
        with contextlib.suppress(OSError):  # nothing is there
            noted = os.read(self._noted, 1024)
            self._came |= any(number in SIGNALS for number in noted)
            if signal.SIGINT in noted:
                self._again()
        return self._came or self.received_at is not None

    def _again(self) -> None:
        """Ends the process at a second Ctrl-C: the main thread may be waiting for another rank."""
        now = time.monotonic()
        self._interrupted_at = self._interrupted_at or now
        if now - self._interrupted_at > _AGAIN_S:
            logger.critical("interrupted once more: ending at once")
            logging.shutdown()
            os._exit(128 + signal.SIGINT)

    @property
    def heard(self) -> bool:
        """This rank's knowledge of a stop: it or another was told to."""
        return self.elsewhere or self.received_at is not None

    def end_at_once(self) -> None:
        """Makes a signal raise ToldToStop, also one that has come, until `hold`: there is nothing to save."""
        self._at_once = True
        if self.received_at is not None:
            self._stop()

    def go_on(self) -> None:
        """Raises Left when this rank knows that one of them was told to stop."""
        if self.heard:
            raise Left

    def hold(self) -> None:
        """Makes a signal set the flag alone."""
        self._at_once = False

    def agreed(self) -> bool:
        """Says whether all ranks know by now that one of them was told to stop, the same on every rank."""
        stop = False
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            stop = bool(flag.item())
        flag = torch.tensor([1 if self.received_at is not None else 0])
        if stop:
            self._pending = None
        else:
            work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
            assert work is not None
            self._pending = (work, flag)
        return stop

    def tell(self) -> None:
        """Tells this rank to stop, as a signal does."""
        if self.received_at is None:
            self.received_at = time.monotonic()
        if self._at_once:
            self._stop()

    def _set(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.received_at is not None and now - self.received_at > _AGAIN_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if self.received_at is None:
            self.by_slurm = number == signal.SIGUSR2
        self.tell()

    def _stop(self) -> None:
        self.hold()
        raise ToldToStop
