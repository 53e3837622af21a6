"""Who waits in a training step: the host for the device, which it hardly should, or the device for the host."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator

import torch

from crate_dist.doctor.contestants import CLASSES, SMALL, alone, recipe_for, synthetic
from crate_dist.doctor.fake_cluster import Counted, counted
from crate_dist.doctor.profiling import profiled
from crate_dist.doctor.stage import Finding, Setting
from crate_dist.doctor.timing import in_turns, median_s
from crate_dist.models.build import build_model
from crate_dist.training.engine import Engine, MicroBatch

STEPS = 4
ACCUMULATION = 2
IDLE = 0.1
"""Share of the device's time above which it is worth a word that the host does not keep up."""


def examine(setting: Setting) -> Iterator[Finding]:
    """Yields the waits per step, the device's idle share, and how far the host is ahead of it."""
    with alone(setting) as device:
        batch = 8 if setting.small else 256
        step = step_of("crate_base", batch, ACCUMULATION, device, setting.small)
        for _ in range(2):
            step()
        yield waits_of("CRATE on one rank", step, ACCUMULATION)
        if device.type != "cuda":
            yield Finding("idle share of the device", "left out", note="a CPU does not run ahead")
            return
        taken = in_turns({"": step}, device, rounds=4, calls=STEPS)[""]
        step_s, host_s = median_s(taken), statistics.median(each.host_s for each in taken)
        kernels = profiled(step, device)
        idle = max(0.0, 1 - kernels.busy_s / step_s)
        note = "the host does not keep up: a larger micro-batch, or a faster core, would help" if idle > IDLE else ""
        facts = {"step_ms": 1000 * step_s, "busy_ms": 1000 * kernels.busy_s, "kernels": kernels.launches}
        yield Finding("idle share of the device", 100 * idle, "%", note=note, facts=facts)
        yield Finding(
            "host, to queue a step", 1000 * host_s, "ms", note=f"the device takes {1000 * step_s:.1f} ms for it"
        )
        yield Finding(f"host ahead of the device after {STEPS} steps", 1000 * STEPS * (step_s - host_s), "ms")


def step_of(
    arch: str, micro_batch: int, accumulation: int, device: torch.device, small: bool, ranks: int = 1
) -> Callable[[], object]:
    """Returns a step of the engine in bf16, compiled on a GPU, on micro-batches that are on the device."""
    recipe = recipe_for(arch, micro_batch, compile=device.type == "cuda", overrides=SMALL if small else ())
    train = recipe.train.model_copy(update={"global_batch": micro_batch * accumulation * ranks})
    recipe = recipe.model_copy(update={"train": train})
    engine = Engine(build_model(recipe.model, CLASSES, seed=0), recipe, device, micro_batch, accumulation)
    batches: Iterator[MicroBatch] = itertools.cycle(
        [synthetic(micro_batch, recipe.model.image_size, seed, device) for seed in range(2)]
    )
    numbers = itertools.count()
    return lambda: engine.step(batches, recipe.optim.lr, next(numbers))


def waits_of(name: str, step: Callable[[], object], accumulation: int) -> Finding:
    """Returns the finding of a step's waits: at most one per micro-batch, and one more."""
    with counted() as found:
        for _ in range(STEPS):
            step()
    return judged(name, found, accumulation)


def judged(name: str, found: Counted, accumulation: int) -> Finding:
    """Returns the finding of what was counted in `STEPS` steps."""
    waits, most = sum(found.waits.values()) / STEPS, accumulation + 1
    kinds = {kind: number / STEPS for kind, number in found.waits.items() if number}
    note = ", ".join(f"{kind}: {number:g}" for kind, number in kinds.items())
    name = f"{name}: waits for the device per step of {accumulation} micro-batch{'es' * (accumulation > 1)}"
    return Finding(name, waits, "", f"at most {most}", waits <= most, note, kinds)
