"""How many images a second a frozen model can take, apart from reading and decoding them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from crate_dist.evaluation.on_ranks import Frozen

_WARM_UP, _ROUNDS = 2, 5


@dataclass(frozen=True)
class Throughput:
    """Images per second of each rank, uint8 pixels on the device to logits, in batches of `batch`.

    compiled: with torch.compile, None where that does not work; compile_s: what compiling took
    """

    batch: int
    eager: float
    compiled: float | None
    compile_s: float

    def describe(self) -> str:
        """Says it in a line."""
        text = f"the model alone, in batches of {self.batch}: {self.eager:,.0f} images/s"
        if self.compiled is None:
            return f"{text}; torch.compile does not work here"
        gain = f"{self.compiled / self.eager:.2f} x"
        return f"{text}, {self.compiled:,.0f} with torch.compile ({gain}; compiling took {self.compile_s:.0f} s)"


@torch.inference_mode()
def measure_throughput(
    model: Frozen, compile: Callable[[Callable[[], object]], bool], seconds: float = 2.0
) -> Throughput:
    """Measures the model as it is, and compiled, on images of noise. A collective.

    compile: compiles the model and tries it by the call that it is given; False where that does not work
    seconds: of each of both measurements, at the least
    """
    side = model.model.config.image_size
    images = torch.randint(0, 256, (model.batch, side, side, 3), dtype=torch.uint8, device=model.device)

    def once() -> torch.Tensor:
        return model.logits(images)

    eager = _rate(once, model, seconds)
    began = time.perf_counter()
    works = compile(once)
    if works:
        once()  # compiles what the layers that were tried do not share
    compile_s = time.perf_counter() - began
    return Throughput(model.batch, eager, _rate(once, model, seconds) if works else None, compile_s)


def _rate(once: Callable[[], object], model: Frozen, seconds: float) -> float:
    """Returns the median rate of the last rounds of some seconds, each of them of as many calls as take a tenth."""
    for _ in range(_WARM_UP):
        once()
    rates: list[float] = []
    calls, began = 1, time.perf_counter()
    while not rates or time.perf_counter() - began < seconds:
        took = _seconds(once, calls, model.device)
        rates.append(model.batch * calls / took)
        calls = 2 * calls if took < seconds / 10 else calls
    return statistics.median(rates[-_ROUNDS:])


def _seconds(once: Callable[[], object], calls: int, device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    for _ in range(calls):
        once()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
