"""What compiling costs: with nothing kept, with what an earlier process has kept, and how many graphs there are."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import torch

from crate_dist.config import Recipe
from crate_dist.doctor.contestants import CLASSES, SMALL, alone, is_cold, is_compiled, recipe_for, synthetic
from crate_dist.doctor.stage import Finding, Setting
from crate_dist.launching.ranks import ending_with_parent
from crate_dist.models.build import build_model
from crate_dist.training.engine import Engine

COLD_S = 180.0
"""Seconds until an engine is ready above which something is wrong: each part of CRATE-B is a dozen kernels."""
SMALL_S = 120.0
"""Seconds that must be left to compile on a CPU, by a C++ compiler, what is not trained so."""
PARTS, PASSES = 3, 2
"""What training.compiling compiles: embedding, layer and head, for the training's pass and for the evaluation's."""


def examine(setting: Setting) -> Iterator[Finding]:
    """Yields the seconds of compiling cold, unless the stage waits has, and warm, and the graphs of a short run."""
    missing = compiler_missing(setting.device)
    if missing:
        yield Finding("compiling", "not possible", passed=False if setting.device == "cuda" else None, note=missing)
        return
    if setting.small and setting.left_s < SMALL_S:
        yield Finding(
            "compiling", "left out", note="it takes a CPU two minutes, which trains eager if not told otherwise"
        )
        return
    batch, precision = (8, "fp32") if setting.small else (256, "bf16")
    recipe = recipe_for("crate_base", batch, precision, True, SMALL if setting.small else ())
    with alone(setting) as device:
        if is_cold(setting, recipe):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), ending_with_parent()) as pool:
                yield ready(recipe, "cold", pool.submit(seconds, recipe, setting).result())
        engine, taken = made(recipe, device)
        yield ready(recipe, "warm", taken if is_compiled(engine.module) else None)
        yield from graphs(engine, device)


def ready(recipe: Recipe, how: str, taken: float | None) -> Finding:
    """Returns the finding of an engine that took `taken` seconds to be ready; None: it could not be compiled."""
    name = f"{recipe.model.arch} at {recipe.train.micro_batch}, {recipe.train.precision}: engine ready, compiled {how}"
    if taken is None:
        return Finding(name, "not compiled", passed=False, note="torch.compile does not work here; the log says why")
    if how == "warm":
        return Finding(name, taken, "s", note="what a restart takes that finds what was compiled as it was")
    return Finding(name, taken, "s", f"at most {COLD_S:g}", taken <= COLD_S)


def compiler_missing(device: str) -> str:
    """Says which compiler torch.compile needs and this machine lacks; "": none."""
    wanted = ("gcc", "cc", "clang") if device == "cuda" else ("g++", "clang++")
    return "" if any(map(shutil.which, wanted)) else f"none of {', '.join(wanted)} is here"


def seconds(recipe: Recipe, setting: Setting) -> float | None:
    """Makes an engine in this process; returns the seconds, None where it could not compile."""
    with alone(setting) as device:
        engine, taken = made(recipe, device)
        return taken if is_compiled(engine.module) else None


def made(recipe: Recipe, device: torch.device, accumulation: int = 1, ranks: int = 1) -> tuple[Engine, float]:
    """Returns an engine for so many of the recipe's micro-batches on each rank, and the seconds until it was ready."""
    began, micro_batch = time.monotonic(), recipe.train.micro_batch
    train = recipe.train.model_copy(update={"global_batch": micro_batch * accumulation * ranks})
    recipe = recipe.model_copy(update={"train": train})
    engine = Engine(build_model(recipe.model, CLASSES, seed=0), recipe, device, micro_batch, accumulation)
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
    images, labels = synthetic(recipe.train.micro_batch, recipe.model.image_size, 0, device)
    for step in range(3):
        engine.step(iter([(images, labels)]), recipe.optim.lr / (1 + step), step)
        engine.predict(images[: len(images) // (1 + step)])
    later = counters["stats"]["unique_graphs"] - before
    yield Finding("graphs made later, by steps and evaluations", float(later), "", "0", later == 0)
