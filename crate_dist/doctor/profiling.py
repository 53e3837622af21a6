"""What a device is busy with during a step, kernel by kernel, by torch's profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from crate_dist.doctor.timing import synchronize


@dataclass(frozen=True)
class Profiled:
    """A step's kernels; on a CPU, its operations.

    seconds: name -> seconds per step, the costliest first; launches: kernels per step
    busy_s: seconds per step in which at least one runs
    """

    seconds: dict[str, float]
    launches: float
    busy_s: float

    def costliest(self, count: int = 8, width: int = 60) -> str:
        """Returns the first in words: share of all, milliseconds, name."""
        whole = sum(self.seconds.values()) or 1.0
        first = list(self.seconds.items())[:count]
        return "; ".join(f"{seconds / whole:.0%} {1000 * seconds:.2f} ms {name[:width]}" for name, seconds in first)


def profiled(step: Callable[[], object], device: torch.device, steps: int = 3) -> Profiled:
    """Takes some steps under the profiler. A GPU's kernels alone are recorded, which hardly slows the host down."""
    on_gpu = device.type == "cuda"
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
        synchronize(device)
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    ran = [
        e for e in profiler.events() or [] if e.device_type == wanted and not getattr(e, "is_user_annotation", False)
    ]
    seconds: Counter[str] = Counter()
    for event in ran:
        seconds[event.name] += (event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total) / 1e6 / steps
    busy_s = _covered((e.time_range.start, e.time_range.end) for e in ran) / 1e6 / steps
    return Profiled(dict(seconds.most_common()), len(ran) / steps, busy_s)


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Returns the length of the union of intervals."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
