"""What compiling costs: with nothing kept, with what an earlier process has kept, and how many graphs there are."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from crate_dist.config import Recipe
from crate_dist.doctor.contestants import CLASSES, SMALL, alone, is_compiled, recipe_for, synthetic
from crate_dist.doctor.stage import Finding, Setting
from crate_dist.models.build import build_model
from crate_dist.training.engine import Engine

COLD_S = 180.0
"""Seconds of a cold compile above which something is wrong: a layer of CRATE-B is a dozen kernels."""
PARTS, PASSES = 3, 2
"""What training.compiling compiles: embedding, layer and head, for the training's pass and for the evaluation's."""


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
    yield Finding(f"{size}: engine ready, compiled cold", cold, "s", f"at most {COLD_S:g}", cold <= COLD_S)
    with alone() as device:
        engine, warm = made(recipe, device)
        note = "what a restart takes that finds $TORCHINDUCTOR_CACHE_DIR as it was"
        yield Finding(f"{size}: engine ready, compiled warm", warm, "s", note=note)
        yield from graphs(engine, device)


def compiler_missing(device: str) -> str:
    """Says which compiler torch.compile needs and this machine lacks; "": none."""
    wanted = ("gcc", "cc", "clang") if device == "cuda" else ("g++", "clang++")
    return "" if any(map(shutil.which, wanted)) else f"none of {', '.join(wanted)} is here"


def seconds(recipe: Recipe, cache: Path) -> float | None:
    """Makes an engine in a fresh process; returns the seconds, None where it could not compile."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    with alone() as device:
        engine, taken = made(recipe, device)
        return taken if is_compiled(engine.module) else None


def made(recipe: Recipe, device: torch.device) -> tuple[Engine, float]:
    """Returns an engine, and the seconds until it was ready."""
    began = time.monotonic()
    engine = Engine(build_model(recipe.model, CLASSES, seed=0), recipe, device, recipe.train.global_batch, 1)
    return engine, time.monotonic() - began


def graphs(engine: Engine, device: torch.device) -> Iterator[Finding]:
    """Trains and evaluates a little: all graphs are made with the engine, one per part, pass and optimizer."""
    from torch._dynamo.utils import counters

    recipe, before = engine.recipe, counters["stats"]["unique_graphs"]
    expected, note = PARTS * PASSES, "embedding, layer and head, for training and for evaluation"
    if device.type == "cuda" and recipe.optim.name == "lion":
        expected, note = expected + len(engine.layouts), f"{note}, and Lion's update"
    passed = is_compiled(engine.module) and before == expected
    yield Finding("graphs made with the engine", float(before), "", f"{expected}", passed, note)
    images, labels = synthetic(recipe.train.global_batch, recipe.model.image_size, 0, device)
    for step in range(3):
        engine.step(iter([(images, labels)]), recipe.optim.lr / (1 + step), step)
        engine.predict(images[: len(images) // (1 + step)])
    later = counters["stats"]["unique_graphs"] - before
    yield Finding("graphs made later, by steps and evaluations", float(later), "", "0", later == 0)
