"""What compiling costs, with nothing kept and with what an earlier process has kept, and how many graphs there are.

What the stages behind this one compute compiled is compiled here, each in a process of its own, all at the same time:
they then measure without waiting for it.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import torch
from torch._dynamo.utils import counters

from crate_dist.config import Recipe
from crate_dist.doctor import ranks, speed, waits
from crate_dist.doctor.contestants import (
    SMALL,
    alone,
    called,
    is_compiled,
    is_warm,
    made,
    note_warm,
    of_case,
    prepare,
    recipe_for,
    synthetic,
)
from crate_dist.doctor.exact import PLAIN, new_model
from crate_dist.doctor.fake_cluster import fake_cluster
from crate_dist.doctor.stage import Finding, Setting
from crate_dist.launching.ranks import ending_with_parent
from crate_dist.training.engine import Engine

COLD_S = 180.0
"""Seconds until an engine is ready above which something is wrong: each part of CRATE-B is a dozen kernels."""
SMALL_S = 120.0
"""Seconds that must be left to compile on a CPU, by a C++ compiler, what is not trained so."""
WARM_S = 20.0
"""Seconds that are kept of the stage for what comes after the compiling."""
PARTS, PASSES = 3, 2
"""What training.compiling compiles: embedding, layer and head, for the training's pass and for the evaluation's."""


@dataclass(frozen=True)
class Job:
    """What is compiled: for a recipe's steps, on rank 0 of so many, or for the case of the stage correct."""

    recipe: Recipe
    ranks: int = 1
    is_case: bool = False

    def __str__(self) -> str:
        return of_case(self.recipe.train.precision) if self.is_case else called(self.recipe)


def examine(setting: Setting) -> Iterator[Finding]:
    """Yields the seconds of each compile as it is ready, then those with all of it kept, and the graphs of a run."""
    missing = compiler_missing(setting.device)
    if missing:
        yield Finding("compiling", "not possible", passed=False if setting.device == "cuda" else None, note=missing)
        return
    if setting.small and setting.left_s < SMALL_S:
        yield Finding(
            "compiling", "left out", note="it takes a CPU two minutes, which trains eager if not told otherwise"
        )
        return
    every = jobs(setting)
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, min(8, cores // len(every)))))
    # More would wait for each other; what comes last is needed least.
    pool = ProcessPoolExecutor(
        min(len(every), max(cores, 2)), multiprocessing.get_context("spawn"), ending_with_parent()
    )
    yield from compiled(every, setting, pool)
    pool.shutdown(wait=False, cancel_futures=True)
    if not is_warm(setting, str(every[0])):
        return
    with alone(setting) as device:
        for job in [every[0], *([Job(waits.modern(setting))] if not setting.small else [])]:
            if not is_warm(setting, str(job)):
                yield setting.left_out(f"{job}: graphs")
                continue
            torch.compiler.reset()
            counters.clear()
            engine, taken = made(job.recipe, device)
            yield ready(job, "warm", taken if is_compiled(engine.module) else None)
            yield from graphs(engine, device)


def jobs(setting: Setting) -> list[Job]:
    """Returns what the stages behind this one compile, the most important first."""
    if setting.small:
        return [Job(recipe_for("crate_base", 8, "fp32", True, SMALL))]
    trained = [
        Job(one.recipe(size.arch, size.batch)) for size in speed.SIZES for one in size.contestants if one.compiled
    ]
    many = [Job(waits.recipe_of(batch, setting, arch), ranks.RANKS) for arch, batch in ranks.SIZES]
    _, recipe = new_model(setting.small, seed=0)
    trains = [recipe.train.model_copy(update={"precision": each, "compile": True}) for each in PLAIN]
    cases = [Job(recipe.model_copy(update={"train": train}), is_case=True) for train in trains]
    every: dict[str, Job] = {}
    for job in [Job(waits.recipe_of(256, setting)), Job(waits.modern(setting)), *many, *cases, *trained]:
        every.setdefault(str(job), job)
    return list(every.values())


def compiled(every: list[Job], setting: Setting, pool: ProcessPoolExecutor) -> Iterator[Finding]:
    """Compiles all at the same time, and yields each as it is ready."""
    futures = {pool.submit(seconds, job, setting): job for job in every}
    try:
        for future in as_completed(futures, timeout=max(setting.left_s - WARM_S, 0)):
            if error := future.exception():
                note = f"{type(error).__name__}: {error}"[:300]
                yield Finding(f"{futures[future]}: engine ready, compiled cold", "failed", passed=False, note=note)
            else:
                yield ready(futures[future], "cold", future.result())
    except TimeoutError:
        late = [str(job) for future, job in futures.items() if not future.done()]
        yield Finding("not compiled in time", "; ".join(late), note="the stages behind compile it, within their time")


def ready(job: Job, how: str, taken: float | None) -> Finding:
    """Returns the finding of an engine that took `taken` seconds to be ready; None: it could not be compiled."""
    name = f"{job}: engine ready, compiled {how}"
    if taken is None:
        return Finding(name, "not compiled", passed=False, note="torch.compile does not work here; the log says why")
    if how == "warm":
        return Finding(name, taken, "s", note="what a restart takes that finds what was compiled as it was")
    return Finding(name, taken, "s", f"at most {COLD_S:g}", taken <= COLD_S)


def compiler_missing(device: str) -> str:
    """Says which compiler torch.compile needs and this machine lacks; "": none."""
    wanted = ("gcc", "cc", "clang") if device == "cuda" else ("g++", "clang++")
    return "" if any(map(shutil.which, wanted)) else f"none of {', '.join(wanted)} is here"


def seconds(job: Job, setting: Setting) -> float | None:
    """Makes an engine in this process; returns the seconds, None where it could not compile."""
    prepare(setting)
    device = torch.device("cuda", 0) if setting.device == "cuda" else torch.device("cpu")
    with fake_cluster(job.ranks) if job.ranks > 1 else alone(setting):
        if job.is_case:
            model, _ = new_model(setting.small, seed=0)
            began = time.monotonic()
            engine = Engine(model, job.recipe, device, job.recipe.train.global_batch, 1)
            taken = time.monotonic() - began
        else:
            engine, taken = made(job.recipe, device, ranks=job.ranks)
        if not is_compiled(engine.module):
            return None
    note_warm(setting, str(job))
    return taken


def graphs(engine: Engine, device: torch.device) -> Iterator[Finding]:
    """Trains and evaluates a little: all graphs are made with the engine, one per part, pass and optimizer."""
    recipe, before = engine.recipe, counters["stats"]["unique_graphs"]
    expected, note = PARTS * PASSES, "embedding, layer and head, for training and for evaluation"
    if recipe.train.precision == "autocast" and engine.module.config.positions == "fourier":
        expected, note = expected + PASSES, f"{note}, the first layer, which reads bf16, by itself"
    if device.type == "cuda" and recipe.optim.name == "lion":
        expected, note = expected + len(engine.layouts), f"{note}, and Lion's update"
    passed = is_compiled(engine.module) and before == expected
    yield Finding(f"{recipe.model.arch}: graphs made with the engine", float(before), "", f"{expected}", passed, note)
    images, _ = synthetic(recipe.train.micro_batch, recipe.model.image_size, 0, device)
    take_step = waits.steps_of(engine)
    for part in range(1, 4):
        take_step()
        engine.predict(images[: len(images) // part])
    later = counters["stats"]["unique_graphs"] - before
    name = f"{recipe.model.arch}: graphs made later, by steps and evaluations"
    yield Finding(name, float(later), "", "0", later == 0)
