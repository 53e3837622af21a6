"""A signal sets a flag, and only that; the ranks agree on it at a step boundary."""

from __future__ import annotations

import logging
import signal
import time
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
"""SIGUSR2: SLURM's warning as submitit asks for it; SIGTERM: preemption, time limit, Ctrl-C of a local launcher."""


class Interrupt:
    """Whether any rank has been told to stop.

    `agreed` is a collective on a gloo group of its own, so that it neither waits for the device nor meets the
    collectives of the step. Each call starts a reduction and takes the result of the one before: no rank waits.
    """

    def __init__(self) -> None:
        self.received_at: float | None = None
        self._group = dist.new_group(backend="gloo")
        self._before: dict[int, object] = {}
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.signal(number, self._set) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def agreed(self) -> bool:
        """Whether all ranks know by now that one of them was told to stop; the same answer on every rank."""
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

    def _set(self, number: int, frame: FrameType | None) -> None:
        if self.received_at is None:
            self.received_at = time.monotonic()
