"""Stands in for a GPU where there is none: streams that run late, memory that is given again, and errors that stay.

Tensors "on the device" are tensors of the CPU. What is asked of a stream is done when the order in which it was asked
allows it, and as late, as early or as much at random as the test wants.
"""

from __future__ import annotations

import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from crate_dist.data import feed

DEVICE = torch.device("cuda", 0)
ALREADY_REGISTERED = 712

Policy = Callable[["PretendedGpu"], None]


def late(gpu: PretendedGpu) -> None:
    """Nothing is done before somebody waits for it."""


def at_once(gpu: PretendedGpu) -> None:
    """All is done that may be."""
    while any(stream.advance() for stream in gpu.streams):
        pass


def copies_first(gpu: PretendedGpu) -> None:
    """All is done that may be, but for the computing, which is done when somebody waits for it."""
    while any(stream.advance() for stream in gpu.streams if stream is not gpu.compute):
        pass


def at_random(seed: int) -> Policy:
    """One stream, then another, goes on by a few steps."""
    rng = random.Random(seed)

    def some(gpu: PretendedGpu) -> None:
        for stream in rng.choices(gpu.streams, k=rng.randrange(4)):
            stream.advance()

    return some


class Moment:
    """A point in the work of a stream."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.passed = stream, False

    def wait(self) -> None:
        """Has the device do what must be done before it, and no more."""
        while not self.passed:
            _, needed = self.stream.asked[0]
            if needed is not None:
                needed.wait()
            assert self.stream.advance()

    def pass_(self) -> None:
        self.passed = True


class Stream:
    """What was asked of it and is not yet done: a piece of work, or a moment of another stream to wait for."""

    def __init__(self, gpu: PretendedGpu) -> None:
        self.gpu, self.asked = gpu, deque[tuple[Callable[[], object], Moment | None]]()
        gpu.streams.append(self)

    def ask(self, work: Callable[[], object], needed: Moment | None = None) -> None:
        self.asked.append((work, needed))
        self.gpu.policy(self.gpu)

    def advance(self) -> bool:
        """Does the next thing. Returns False where there is none, or it must wait."""
        if not self.asked or ((needed := self.asked[0][1]) is not None and not needed.passed):
            return False
        self.asked.popleft()[0]()
        return True

    def moment(self) -> Moment:
        moment = Moment(self)
        self.ask(moment.pass_)
        return moment

    def wait_event(self, event: Event) -> None:
        self.ask(lambda: None, event.moment)

    def wait_stream(self, other: Stream) -> None:
        self.ask(lambda: None, other.moment())


class Event:
    """As torch.cuda.Event; the waits of the host are counted."""

    moment: Moment

    def __init__(self, gpu: PretendedGpu) -> None:
        self._gpu = gpu

    def record(self, stream: Stream) -> None:
        self.moment = stream.moment()

    def synchronize(self) -> None:
        self._gpu.host_waits += 1
        self.moment.wait()


class PretendedGpu(TorchFunctionMode):
    """Also the stand-in for torch.cuda.cudart().

    calls: of CUDA's functions, by name, and of synchronize; failing: names of those that fail
    blocking: copies between host and device for which the host had to wait, and other looks at the device's values
    host_waits: for an event
    most_held: bytes of the device's memory that were in use, or kept for a stream, at the most
    """

    def __init__(self, policy: Policy, failing: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.policy, self.failing = policy, failing
        self.streams: list[Stream] = []
        self.compute = self.current = Stream(self)
        self.calls: list[tuple[Any, ...]] = []
        self.last_error = 0
        self.blocking: list[str] = []
        self.host_waits = self.most_held = 0
        self._free: dict[tuple[int, int], list[torch.Tensor]] = {}
        self._registered: dict[int, int] = {}
        self._own_pinned = set[int]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.__name__
        if name == "to" and DEVICE in args:
            return self._to_device(args[0], bool(kwargs.get("non_blocking")))
        if name == "pin_memory":
            return self._pinned(args[0])
        if name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
            self.blocking.append(name)
        if torch.device(kwargs.get("device") or "cpu") == DEVICE:
            self._check()
            if name in ("tensor", "as_tensor"):
                self.blocking.append(name)
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)

    def launch(self, kernel: Callable[[], object]) -> None:
        """Asks the stream of all computing."""
        self._check()
        self.current.ask(kernel)

    def finish(self) -> None:
        """Does all that was asked."""
        for stream in self.streams:
            stream.moment().wait()

    def _check(self) -> None:
        error, self.last_error = self.last_error, 0
        if error:
            raise RuntimeError(f"CUDA error {error}")

    def _to_device(self, source: torch.Tensor, non_blocking: bool) -> torch.Tensor:
        stream, size = self.current, source.nbytes
        free = self._free.setdefault((id(stream), size), [])
        if not free:
            self.most_held += size
        memory = free.pop() if free else torch.empty(size, dtype=torch.uint8)
        out = memory.view(source.dtype).view(source.shape)
        # Given again, to this stream, as soon as the host has let go of it: what was asked before may still use it.
        weakref.finalize(out, free.append, memory)
        into, source = out.detach(), source.detach()
        stream.ask(lambda: into.copy_(source))
        if not (non_blocking and self.is_pinned(source)):
            self.blocking.append("to")
            stream.moment().wait()
        return out

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        ours = any(first <= begin and end <= first + size for first, size in self._registered.items())
        return ours or begin in self._own_pinned

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.is_pinned(tensor):
            return tensor
        copy = tensor.clone()
        self._own_pinned.add(copy.data_ptr())
        weakref.finalize(copy, self._own_pinned.discard, copy.data_ptr())
        return copy

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def synchronize(self, device: torch.device) -> None:
        self.calls.append(("synchronize",))
        self.finish()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if (status := self._called("cudaHostRegister", address, size, flags)) == 0:
            self._registered[address] = size
        return status

    def cudaHostUnregister(self, address: int) -> int:
        assert any(line.startswith(f"{address:x}-") for line in Path("/proc/self/maps").read_text().splitlines())
        assert not any(stream.asked for stream in self.streams), "a copy is under way"
        if (status := self._called("cudaHostUnregister", address)) == 0:
            del self._registered[address]
        return status

    def cudaGetErrorString(self, status: int) -> str:
        return f"the error {status}"

    def _called(self, name: str, *arguments: int) -> int:
        self.calls.append((name, *arguments))
        status = ALREADY_REGISTERED if name in self.failing else 0
        self.last_error = status or self.last_error
        return status


@contextmanager
def pretended_gpu(policy: Policy = at_once, failing: tuple[str, ...] = ()) -> Iterator[PretendedGpu]:
    """Puts one in the place of torch.cuda, for tensors that are asked for by DEVICE."""
    gpu = PretendedGpu(policy, failing)
    feed._copying_stream.cache_clear()
    with pytest.MonkeyPatch.context() as patch, gpu:
        patch.setattr(torch.cuda, "is_available", lambda: False)  # where there is a real one, it is left alone
        patch.setattr(torch.cuda, "Stream", lambda device: Stream(gpu))
        patch.setattr(torch.cuda, "Event", lambda blocking=False: Event(gpu))
        patch.setattr(torch.cuda, "current_stream", lambda device: gpu.current)
        patch.setattr(torch.cuda, "stream", gpu.on)
        patch.setattr(torch.cuda, "device", lambda device: gpu.on(gpu.current))
        patch.setattr(torch.cuda, "synchronize", gpu.synchronize)
        patch.setattr(torch.cuda, "cudart", lambda: gpu)
        yield gpu
    feed._copying_stream.cache_clear()
