"""Measures work on a device as training does it: queued without waiting, between events, contestants in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeVar

import torch

Name = TypeVar("Name")


class Taken(NamedTuple):
    """Seconds of one call of some work.

    device_s: from the device's first operation to its last, queueing included; on a CPU those of the clock
    host_s: until the host has queued it
    cpu_s: of the CPU, in all threads
    """

    device_s: float
    host_s: float
    cpu_s: float


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def queued(work: Callable[[], object], device: torch.device, calls: int = 1) -> Taken:
    """Calls `work` several times without waiting between; returns what one call took."""
    synchronize(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
    used, began = time.process_time(), time.perf_counter()
    for event in events[:1]:
        event.record()
    for _ in range(calls):
        work()
    host_s = device_s = time.perf_counter() - began
    for event in events[1:]:
        event.record()
        synchronize(device)
        device_s = events[0].elapsed_time(event) / 1000
    return Taken(device_s / calls, host_s / calls, (time.process_time() - used) / calls)


def in_turns(
    contestants: Mapping[Name, Callable[[], object]],
    device: torch.device,
    rounds: int,
    calls: int = 1,
    warm_up: int = 2,
) -> dict[Name, list[Taken]]:
    """Measures each contestant once a round, so that what disturbs the machine disturbs all.

    calls: of the work in each round, queued together; warm_up: calls of each before the first round
    """
    for work in contestants.values():
        for _ in range(warm_up):
            work()
    taken: dict[Name, list[Taken]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            taken[name].append(queued(work, device, calls))
    return taken


def median_s(taken: Iterable[Taken]) -> float:
    """Returns the median of the device's seconds."""
    return statistics.median(one.device_s for one in taken)


def host_median_s(work: Callable[[], object], device: torch.device, calls: int = 5) -> float:
    """Returns the median of the host's seconds for one call that finds the device idle.

    Within several it would wait: a step begins when the one before the last is done.
    """
    return statistics.median(queued(work, device).host_s for _ in range(calls))
