"""Who waits in a training step: the host for the device, which it hardly should, or the device for the host."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from crate_dist.config import Recipe
from crate_dist.data.loader import Batch
from crate_dist.doctor.contestants import SMALL, alone, free, made, recipe_for, synthetic
from crate_dist.doctor.fake_cluster import Counted, counted
from crate_dist.doctor.profiling import profiled
from crate_dist.doctor.stage import Finding, Setting
from crate_dist.doctor.timing import host_median_s, in_turns, median_s
from crate_dist.training.engine import Engine
from crate_dist.training.mixing import Mixing

STEPS = 4
ACCUMULATION = 2
ANOTHER_S = 10.0
"""Seconds that must be left to begin a further model."""
IDLE = 0.1
"""Share of the device's time above which it is worth a word that the host does not keep up."""


def examine(setting: Setting) -> Iterator[Finding]:
    """Yields the waits per step, the device's idle share, and how far the host is ahead of it."""
    with alone(setting) as device:
        recipe = recipe_of(8 if setting.small else 256, setting)
        step = steps_of(made(recipe, device, ACCUMULATION)[0])
        yield waits_of("CRATE on one rank", step, ACCUMULATION)
        if setting.left_s >= ANOTHER_S:
            engine = made(modern(setting), device, ACCUMULATION)[0]
            yield waits_of("ToST on one rank, mixed, averaged", steps_of(engine), ACCUMULATION)
            del engine
            free(device)
        else:
            yield setting.left_out("ToST on one rank, mixed, averaged")
        if device.type != "cuda":
            yield Finding("idle share of the device", "left out", note="a CPU does not run ahead")
            return
        taken = in_turns({"": step}, device, rounds=4, calls=STEPS)[""]
        step_s, host_s = median_s(taken), host_median_s(step, device)
        kernels = profiled(step, device)
        idle = max(0.0, 1 - kernels.busy_s / step_s)
        note = "the host does not keep up: a larger micro-batch, or a faster core, would help" if idle > IDLE else ""
        facts = {"step_ms": 1000 * step_s, "busy_ms": 1000 * kernels.busy_s, "kernels": kernels.launches}
        yield Finding("idle share of the device", 100 * idle, "%", note=note, facts=facts)
        yield Finding(
            "host, to queue a step", 1000 * host_s, "ms", note=f"the device takes {1000 * step_s:.1f} ms for it"
        )
        yield Finding("host, free in each step", 1000 * (step_s - host_s), "ms", note="for loaders, logs and saving")


def recipe_of(micro_batch: int, setting: Setting, arch: str = "crate_base") -> Recipe:
    """Returns the recipe of a model in bf16, compiled on a GPU; in small that of the demo."""
    on_gpu = setting.device == "cuda"
    return recipe_for(arch, micro_batch, compile=on_gpu, overrides=SMALL if setting.small else ())


def modern(setting: Setting) -> Recipe:
    """Returns the recipe of ToST, of which CRATE's has nothing: mixing, drop path, batch norm, an average, AdamW.

    As it ships, but for two groups in a micro-batch; in small of other sizes.
    """
    small = ("image_size=32", "patch_size=8", "depth=2", "width=48", "heads=2") if setting.small else ()
    micro_batch = 4 if setting.small else 128
    overrides = [f"train.group={micro_batch // 2}", *(f"model.{size}" for size in small)]
    return recipe_for("tost_small_12", micro_batch, compile=setting.device == "cuda", overrides=overrides)


def steps_of(engine: Engine) -> Callable[[], object]:
    """Returns a step of the engine, at a new rate, on micro-batches on the device, mixed where the recipe mixes."""
    recipe, mixing, numbers = engine.recipe, Mixing(engine.recipe), itertools.count()
    images, side = recipe.train.micro_batch, recipe.model.image_size
    given = itertools.cycle([synthetic(images, side, seed, engine.device) for seed in range(2)])
    samples = np.arange(images)

    def step() -> object:
        number = next(numbers)
        batches = (mixing.mixed(Batch(*batch, samples=samples), number) for batch in given)
        return engine.step(batches, recipe.optim.lr / (1 + number), number)

    return step


def waits_of(name: str, step: Callable[[], object], accumulation: int) -> Finding:
    """Returns the finding of a step's waits, after two others: at most one per micro-batch, and one more."""
    for _ in range(2):
        step()
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
