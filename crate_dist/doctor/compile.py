"""What compiling costs: with nothing kept, with what an earlier process has kept, and how many graphs there are."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from crate_dist.config import Recipe
from crate_dist.doctor.contestants import CLASSES, SMALL, alone, is_compiled, recipe_for, synthetic
from crate_dist.doctor.stage import Finding, Setting
from crate_dist.models.build import build_model
from crate_dist.training import compiling
from crate_dist.training.engine import Engine

COLD_S = 180.0
"""Seconds of a cold compile above which something is wrong: a layer of CRATE-B is a dozen kernels."""


def examine(setting: Setting) -> Iterator[Finding]:
    """Yields the seconds of compiling cold and warm, each in a process of its own, and the graphs of a short run."""
    missing = compiler_missing(setting.device)
    if missing:
        yield Finding("compiling", "not possible", passed=False if setting.device == "cuda" else None, note=missing)
        return
    cache = setting.scratch / "compiled"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    batch = 8 if setting.small else 256
    precision = "fp32" if setting.small else "bf16"
    recipe = recipe_for("crate_base", batch, precision, True, SMALL if setting.small else ())
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        cold = pool.submit(seconds, recipe, cache).result()
    if cold is None:
        yield Finding("compiling", "failed", passed=False, note="torch.compile does not work here; the log says why")
        return
    size = f"{recipe.model.arch} at {batch}, {precision}"
    yield Finding(f"{size}: compiled cold", cold, "s", f"at most {COLD_S:g}", cold <= COLD_S)
    with alone() as device:
        warm = compile_once(recipe, device)
        note = "what a restart takes that finds $TORCHINDUCTOR_CACHE_DIR as it was"
        yield Finding(f"{size}: compiled warm", "failed" if warm is None else warm, "s", note=note)
        yield from graphs(recipe, device)


def compiler_missing(device: str) -> str:
    """Says which compiler torch.compile needs and this machine lacks; "": none."""
    wanted = ("gcc", "cc", "clang") if device == "cuda" else ("g++", "clang++")
    return "" if any(map(shutil.which, wanted)) else f"none of {', '.join(wanted)} is here"


def seconds(recipe: Recipe, cache: Path) -> float | None:
    """Compiles in a fresh process; returns the seconds, None where it failed."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    with alone() as device:
        return compile_once(recipe, device)


def compile_once(recipe: Recipe, device: torch.device) -> float | None:
    """Compiles the layers of the recipe's model; returns the seconds, None where it failed."""
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    model = build_model(recipe.model, CLASSES, seed=0).to(device, dtype)
    model.set_execution(images=recipe.train.global_batch)
    return compiling.compile_layers(model, device, dtype, recipe.train.global_batch)


def graphs(recipe: Recipe, device: torch.device) -> Iterator[Finding]:
    """Trains and evaluates a little: one graph per kind of module that is compiled, one for Lion, and none later."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    batch, side = recipe.train.global_batch, recipe.model.image_size
    engine = Engine(build_model(recipe.model, CLASSES, seed=0), recipe, device, batch, 1)
    images, labels = synthetic(batch, side, 0, device)
    engine.step(iter([(images, labels)]), recipe.optim.lr, 0)
    kinds = {type(module).__name__ for module in engine.module.modules() if module._compiled_call_impl is not None}
    made, expected = (
        counters["stats"]["unique_graphs"],
        len(kinds) + (device.type == "cuda" and recipe.optim.name == "lion"),
    )
    note = f"one for each of {', '.join(sorted(kinds))}" + (" and one for Lion" if expected > len(kinds) else "")
    passed = is_compiled(engine.module) and made == expected
    yield Finding("graphs in the first step", float(made), "", f"{expected}", passed, note)
    for step in range(1, 4):
        engine.step(iter([(images, labels)]), recipe.optim.lr / step, step)
        engine.predict(images[: batch // step])
    later = counters["stats"]["unique_graphs"] - made
    yield Finding("graphs made later, by steps and evaluations", float(later), "", "0", later == 0)
