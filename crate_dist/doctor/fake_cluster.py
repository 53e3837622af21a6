"""Stands one process among any number of ranks that are not there, and counts what a step waits for and sends.

The ranks are torch's "fake" process group: it partitions as a cluster would, sends nothing, and hands every rank's part
back as this one's. What is computed with it is therefore no training, but its shapes, calls and costs are those of one
rank of that cluster. On a CPU the accelerator has streams, as DeepSpeed sees it, so that it takes a GPU's path.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import crate_dist.training.zero  # noqa: F401  # chooses DeepSpeed's accelerator, before it is imported
from crate_dist.world import World

import deepspeed.comm.comm as deepspeed_comm  # isort: skip
from deepspeed.accelerator import get_accelerator, set_accelerator  # isort: skip
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator  # isort: skip
from deepspeed.utils import groups as deepspeed_groups  # isort: skip


@dataclass
class Message:
    """A collective that was issued.

    kind: "all_reduce", "reduce", "all_gather", …
    bytes: of the whole vector, as it is before it is scattered or after it is gathered
    ranks: of its group
    """

    kind: str
    bytes: int
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that a ring sends per rank."""
        return self.bytes * (self.ranks - 1) / self.ranks * (2 if self.kind == "all_reduce" else 1)


@dataclass
class Counted:
    """What happened while it was counted.

    waits: what the host waited for -> how often. "device": for all of it; "stream", "event"; "value": an operation
        that must know a number on the device, or copies one from or to pageable memory
    messages: the collectives, in their order
    """

    waits: Counter[str] = field(default_factory=Counter)
    messages: list[Message] = field(default_factory=list)

    def kinds(self, at_least: int = 65) -> dict[str, int]:
        """Returns kind -> number of messages of that many bytes or more; a norm or a flag is no traffic."""
        return dict(Counter(message.kind for message in self.messages if message.bytes >= at_least))


@contextlib.contextmanager
def fake_cluster(world_size: int, rank: int = 0) -> Iterator[World]:
    """Joins as `rank` of `world_size`, alone. Raises RuntimeError: this process is in a process group already.

    An engine is made and used inside. On a CPU it finds an accelerator with streams, whose order it keeps as on a GPU.
    """
    if dist.is_initialized():
        raise RuntimeError("this process is in a process group already, and can join only one")
    world = World(rank, world_size, 0, 1, "127.0.0.1", 0, "fake")
    with contextlib.ExitStack() as undone:
        undone.enter_context(patch.dict(os.environ, world.environment()))
        undone.enter_context(patch.object(deepspeed_comm, "cdb", None))
        undone.enter_context(patch.object(deepspeed_groups, "_WORLD_GROUP", None))
        undone.enter_context(streams())
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        undone.callback(dist.destroy_process_group)
        yield world


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """Shows DeepSpeed, and an engine that is made inside, a CPU as a device with streams; leaves a GPU as it is."""
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        yield
        return
    set_accelerator(WithStreams())
    try:
        with patch.object(torch.Tensor, "record_stream", lambda tensor, stream: None):
            yield
    finally:
        set_accelerator(accelerator)


@contextlib.contextmanager
def counted() -> Iterator[Counted]:
    """Counts waits and messages of what is done inside, on any process group.

    On a CPU every look at a number counts as a wait, since on a GPU it would be one; compiled code runs eager
    meanwhile. On a GPU the driver's own warnings count, and compiled code stays compiled.
    """
    found = Counted()
    with contextlib.ExitStack() as undone:
        for name in _METHODS.keys() & set(dir(dist.ProcessGroup)):
            undone.enter_context(patch.object(dist.ProcessGroup, name, _heard(name, found)))
        if get_accelerator().device_name() == "cuda":
            undone.enter_context(_waits_of_cuda(found.waits))
        else:
            undone.enter_context(patch.object(_Waiting, "counted", found.waits))
            undone.enter_context(_Values(found.waits))
        yield found


def _heard(name: str, found: Counted) -> Callable[..., Any]:
    """Returns the process group's method of that name, which notes its message first."""
    function, (kind, vector) = getattr(dist.ProcessGroup, name), _METHODS[name]

    def heard(group: Any, *given: Any, **named: Any) -> Any:
        tensors = _tensors(given[vector]) if len(given) > vector else []
        found.messages.append(Message(kind, sum(t.numel() * t.element_size() for t in tensors), group.size()))
        return function(group, *given, **named)

    return heard


_METHODS = {
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce", 0),
    "reduce": ("reduce", 0),
    "broadcast": ("broadcast", 0),
    "allgather": ("all_gather", 0),
    "_allgather_base": ("all_gather", 0),
    "all_gather_single": ("all_gather", 0),
    "allgather_into_tensor_coalesced": ("all_gather", 0),
    "reduce_scatter": ("reduce_scatter", 1),
    "_reduce_scatter_base": ("reduce_scatter", 1),
    "reduce_scatter_single": ("reduce_scatter", 1),
    "alltoall_base": ("all_to_all", 1),
    "all_to_all_single": ("all_to_all", 1),
    "send": ("send", 0),
    "barrier": ("barrier", 0),
}
"""Methods of process groups, by the names of several versions of torch -> what they do, and which argument is whole."""


def _tensors(given: Any) -> list[torch.Tensor]:
    if isinstance(given, torch.Tensor):
        return [given]
    return [tensor for item in given for tensor in _tensors(item)] if isinstance(given, list | tuple) else []


@contextlib.contextmanager
def _waits_of_cuda(waits: Counter[str]) -> Iterator[None]:
    """Counts waits of a GPU: the three that have names, and those that the driver's debug mode warns of."""
    named = ((torch.cuda, "device"), (torch.cuda.Stream, "stream"), (torch.cuda.Event, "event"))
    before = torch.cuda.get_sync_debug_mode()
    with contextlib.ExitStack() as undone:
        warned = undone.enter_context(warnings.catch_warnings(record=True))
        for owner, name in named:
            undone.enter_context(patch.object(owner, "synchronize", _tallied(owner.synchronize, name, waits)))
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        undone.callback(torch.cuda.set_sync_debug_mode, before)
        yield
    said = sum("called a synchronizing" in str(warning.message) for warning in warned)
    # A stream's own wait warns as well (stream_synchronize of c10/cuda/CUDAFunctions.h), an event's not.
    waits["value"] += max(said - waits["stream"], 0)


def _tallied(function: Callable[..., Any], name: str, waits: Counter[str]) -> Callable[..., Any]:
    def tallied(*given: Any, **named: Any) -> Any:
        waits[name] += 1
        return function(*given, **named)

    return tallied


class _Values(TorchDispatchMode):
    """Counts operations whose outcome the host must see, also those of the backward pass."""

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _LOOKS:
            self._waits["value"] += 1
        return func(*args, **(kwargs or {}))


_LOOKS = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten.equal,
    torch.ops.aten._unique2,
}


class _Waiting:
    """Where streams, events and the accelerator of a CPU note that the host has waited for them."""

    counted: ClassVar[Counter[str]] = Counter()

    def _waited(self, what: str) -> None:
        _Waiting.counted[what] += 1


class CpuStream(_Waiting):
    """A stream on a device that does everything at once."""

    def synchronize(self) -> None:
        self._waited("stream")

    def wait_stream(self, other: CpuStream) -> None:
        pass

    def wait_event(self, event: CpuEvent) -> None:
        pass

    def record_event(self, event: CpuEvent | None = None) -> CpuEvent:
        return event or CpuEvent()


class CpuEvent(_Waiting):
    at_s = 0.0

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def record(self, stream: CpuStream | None = None) -> None:
        self.at_s = time.perf_counter()

    def wait(self, stream: CpuStream | None = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: CpuEvent) -> float:
        return 1e3 * (end.at_s - self.at_s)

    def synchronize(self) -> None:
        self._waited("event")


class WithStreams(CPU_Accelerator, _Waiting):
    """DeepSpeed's accelerator of the CPU, which says that it has streams and does not know when work is done."""

    def __init__(self) -> None:
        super().__init__()
        self._current = self._default = CpuStream()

    def is_synchronized_device(self) -> bool:
        return False

    def synchronize(self, device_index: int | None = None) -> None:
        self._waited("device")

    @property
    def Stream(self) -> type[CpuStream]:
        return CpuStream

    @property
    def Event(self) -> type[CpuEvent]:
        return CpuEvent

    @contextlib.contextmanager
    def stream(self, stream: CpuStream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def current_stream(self, device_index: int | None = None) -> CpuStream:
        return self._current

    def default_stream(self, device_index: int | None = None) -> CpuStream:
        return self._default
