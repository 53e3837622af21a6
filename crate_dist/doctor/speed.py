"""How fast a training step is, beside a plain loop and the published code, and whether its memory is what we say.

Steps are queued without waiting, some at a time, between events, in turns with those they are compared with; medians of
the rounds. MFU: the operations that must be computed (models/costs.py), three times the forward pass's, over the rate
of a product of 8192³ in bf16. The published loop is that of its main.py: fp16 under autocast, with a GradScaler, Lion
of lion-pytorch, eager. Without a checkout of the published code (--reference) its formulation in plain PyTorch stands
in, and is named so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from crate_dist.config import Recipe
from crate_dist.doctor.ceilings import product_flop_s
from crate_dist.doctor.contestants import (
    CLASSES,
    OURS,
    PLAIN,
    PUBLISHED,
    SMALL,
    Contestant,
    Measured,
    NotCompiled,
    alone,
    called,
    free,
    is_warm,
    synthetic,
)
from crate_dist.doctor.profiling import profiled
from crate_dist.doctor.stage import SMALL_NOTE, Finding, Setting
from crate_dist.doctor.timing import host_median_s, in_turns, median_s, queued
from crate_dist.launching.memory import RESERVE, step_bytes
from crate_dist.models.build import model_config
from crate_dist.models.costs import step_flops

EXPECTED = {
    ("H200", "crate_base at 256"): 8000.0,
    ("H200", "crate_large at 128"): 3500.0,
    ("H100 80GB HBM3", "crate_base at 256"): 7000.0,
    ("H100 80GB HBM3", "crate_large at 128"): 3200.0,
}
"""Images/s of `BEST`. The H200's are estimates from counts of operations and traffic, the H100's those with a third of
the step slower as its memory is."""
RATIO = 3.0
"""How many times the published loop's speed is expected of `BEST`."""
MEMORY = 0.15
"""Largest share by which the estimate of memory may be off."""
COMPILE_S, STEPS_S = 50.0, 15.0
"""Seconds that must be left to begin a size: its compile, where no stage before has made it; and its steps."""
BEST, EAGER = Contestant(OURS, compiled=True), Contestant(OURS)
LOOP, THEIRS = Contestant(PLAIN, compiled=True), Contestant(PUBLISHED)
AUTOCAST = Contestant(OURS, "autocast", compiled=True), Contestant(OURS, "autocast")


@dataclass(frozen=True)
class Size:
    """A model and its batch, and who takes steps of it."""

    arch: str
    batch: int
    contestants: tuple[Contestant, ...]

    def __str__(self) -> str:
        return f"{self.arch} at {self.batch}"


SIZES = [
    Size("crate_base", 256, (BEST, THEIRS)),
    Size("crate_large", 128, (BEST, THEIRS)),
    Size("crate_base", 256, (LOOP, EAGER)),
    Size("crate_base", 256, AUTOCAST),
    Size("crate_base", 64, (BEST, LOOP, EAGER)),
    Size("crate_base", 128, (BEST, LOOP)),
    Size("crate_large", 64, (BEST, LOOP)),
]
"""What is measured, the most important first."""
SMALL_SIZES = [Size("crate_base", 4, (EAGER, THEIRS, Contestant(PLAIN)))]


def examine(setting: Setting) -> Iterator[Finding]:
    """Yields a finding per contestant and size, the most important first, as far as the time goes."""
    if setting.small:
        yield Finding("sizes", "small", note=SMALL_NOTE)
    left_out = ["compiled, by which a CPU gains nothing"] if setting.small else []
    with alone(setting) as device:
        side = 1024 if setting.small else 8192
        rate = product_flop_s(device, side, side, side)
        for number, size in enumerate(SMALL_SIZES if setting.small else SIZES):
            recipes = {
                one: one.recipe(size.arch, size.batch, SMALL if setting.small else ()) for one in size.contestants
            }
            cold = any(one.compiled and not is_warm(setting, called(recipe)) for one, recipe in recipes.items())
            if setting.left_s < STEPS_S + (COMPILE_S if cold else 0):
                left_out.append(f"{size}: {', '.join(one.name(setting.reference) for one in size.contestants)}")
                continue
            try:
                yield from compared(recipes, device, rate, setting.reference, profiling=number == 0)
            except torch.OutOfMemoryError:
                yield Finding(f"{size}, in turns", "out of memory", note="the next size goes on")
            free(device)
            torch.compiler.reset()  # torch makes eight graphs of a function, and no more
    if left_out:
        yield Finding("left out", "; ".join(left_out), note="" if setting.small else "--only speed has more time")


def compared(
    recipes: dict[Contestant, Recipe],
    device: torch.device,
    rate: float,
    reference: Path | None,
    profiling: bool,
) -> Iterator[Finding]:
    """Measures the contestants of one size in turns."""
    recipe = next(iter(recipes.values()))
    batch = recipe.train.global_batch
    size = f"{recipe.model.arch} at {batch}"
    batches = [synthetic(batch, recipe.model.image_size, seed, device) for seed in range(2)]
    running: dict[Contestant, Measured] = {}
    for one, recipe in recipes.items():
        free(device)
        try:
            running[one] = Measured(partial(one.build, recipe, device, reference), batches, device)
        except torch.OutOfMemoryError:
            yield out_of_memory(f"{size}, {one.name(reference)}", one, recipe, device)
        except NotCompiled as error:
            yield Finding(f"{size}, {one.name(reference)}", "not compiled", passed=False, note=str(error))
        else:
            name, peak = f"{size}, {one.name(reference)}", running[one].peak
            if one.whose == OURS and peak is not None:
                yield memory(f"{name}: peak memory", peak, step_bytes(recipe, batch, world_size=1))
            if device.type == "cuda":
                rate_first = batch / queued(running[one], device, calls=4).device_s
                yield Finding(f"{name}, at first", rate_first, "images/s", note="of four steps; the medians come below")
    free(device)
    taken = in_turns(running, device, rounds=4, calls=8 if device.type == "cuda" else 1, warm_up=1)
    hosts = {one: host_median_s(step, device) if device.type == "cuda" else 0.0 for one, step in running.items()}
    seconds = {one: median_s(each) for one, each in taken.items()}
    for one, step_s in seconds.items():
        name, peak = f"{size}, {one.name(reference)}", running[one].peak
        flops = step_flops(model_config(recipes[one].model, CLASSES), batch)
        facts: dict[str, Any] = {
            "MFU": flops / step_s / rate,
            "step_ms": 1000 * step_s,
            "host_ms": 1000 * (hosts[one] or step_s),
            "peak_gb": peak and peak / 1e9,
        }
        yield rated(name, batch / step_s, expected_images_s(device, size) if one == BEST else None, facts)
    mine = BEST if BEST in seconds else EAGER
    if {mine, THEIRS} <= seconds.keys():
        yield ratio(
            f"{size}, {mine.name(None)}, against {THEIRS.name(reference)}", seconds[THEIRS] / seconds[mine], device
        )
    if profiling and mine in running:
        kernels = profiled(running[mine], device)
        facts = {"ms_per_step": {name: 1000 * s for name, s in list(kernels.seconds.items())[:30]}}
        yield Finding(f"{size}, {mine.name(None)}: costliest kernels", kernels.costliest(), facts=facts)


def rated(name: str, images_s: float, expected: float | None, facts: dict[str, Any]) -> Finding:
    """Returns the finding of a speed; one that is known to be slow for this GPU has failed."""
    said = f"{facts['MFU']:.0%} MFU, {facts['step_ms']:.1f} ms, of which the host {facts['host_ms']:.1f}"
    said += f", {facts['peak_gb']:.1f} GB" if facts["peak_gb"] else ""
    if expected is None:
        return Finding(name, images_s, "images/s", note=said, facts=facts)
    passed = images_s >= expected
    return Finding(name, images_s, "images/s", f"at least {expected:,.0f}", passed, said, facts)


def memory(name: str, peak: float, estimate: float) -> Finding:
    """Returns the finding of what the device held, beside what launching/memory.py says of it."""
    off = estimate / peak - 1
    passed = abs(off) <= MEMORY
    expected = f"{(1 - MEMORY) * estimate / 1e9:.1f} to {(1 + MEMORY) * estimate / 1e9:.1f}"
    return Finding(name, peak / 1e9, "GB", expected, passed, f"the estimate is {off:+.0%} off", {"estimate": estimate})


def ratio(name: str, times: float, device: torch.device) -> Finding:
    """Returns the finding of how many times as fast as the published loop ours is."""
    if device.type != "cuda":
        return Finding(name, times, "times")
    known = any(part in torch.cuda.get_device_name() for part, _ in EXPECTED)
    return Finding(name, times, "times", f"at least {RATIO:g}", times >= RATIO if known else None)


def out_of_memory(name: str, one: Contestant, recipe: Recipe, device: torch.device) -> Finding:
    """Returns the finding of a size that the device could not hold; it has failed where we say that it fits."""
    has = torch.cuda.get_device_properties(device).total_memory
    needs = step_bytes(recipe, recipe.train.global_batch, world_size=1)
    fits = one.whose == OURS and needs <= (1 - RESERVE) * has
    note = f"the estimate is {needs / 1e9:.1f} GB of {has / 1e9:.1f}"
    return Finding(name, "out of memory", passed=False if fits else None, note=note)


def expected_images_s(device: torch.device, size: str) -> float | None:
    """Returns the images/s that are expected of `BEST` on this GPU; None: it is not known."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    return next((speed for (part, of), speed in EXPECTED.items() if part in name and of == size), None)
