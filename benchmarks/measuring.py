"""Measures contestants that take turns, runs ranks, names the machine, and prints and writes what was found.

Programs import it before all else: a bare Python is then told by crate_dist what it lacks. Imports no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

sys.path.append(str(Path(__file__).parents[1]))
import crate_dist  # noqa: F401  isort: skip
import numpy as np
from tqdm import tqdm

from crate_dist.arguments import Parser
from crate_dist.launching.ranks import rank_environment
from crate_dist.world import detect_world, free_port

Name = TypeVar("Name")


class Cost(NamedTuple):
    """Seconds of the clock, and of the CPU in all threads."""

    wall_s: float
    cpu_s: float


def cost(
    work: Callable[..., object], *arguments: Any, count: int = 1, cpu_s: Callable[[], float] = time.process_time
) -> Cost:
    """Calls `work` and returns what each of the `count` things that it does took.

    cpu_s: the CPU seconds so far, of this process as a rule
    """
    began, used = time.perf_counter(), cpu_s()
    work(*arguments)
    return Cost((time.perf_counter() - began) / count, (cpu_s() - used) / count)


def in_turns(contestants: Mapping[Name, Callable[[], Cost]], rounds: int, warm_up: int = 0) -> dict[Name, list[Cost]]:
    """Measures each contestant once a round, so that a busy machine is busy for all; warm-up rounds do not count."""
    costs: dict[Name, list[Cost]] = {name: [] for name in contestants}
    for number in tqdm(range(-warm_up, rounds), unit="round"):
        for name, measure in contestants.items():
            taken = measure()
            if number >= 0:
                costs[name].append(taken)
    return costs


def quartiles(values: Sequence[float]) -> list[float]:
    """Returns the lower quartile, the median and the upper quartile."""
    return [float(value) for value in np.percentile(values, (25, 50, 75))]


def psnr_db(pixels: np.ndarray, reference: np.ndarray) -> float:
    """Returns the peak signal-to-noise ratio of 8-bit pixels in dB; 99 for equal pictures."""
    error = float(((pixels.astype(float) - reference) ** 2).mean())
    return 10 * float(np.log10(255**2 / error)) if error else 99.0


def on_ranks(ranks: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Calls work(world, device, *arguments) on `ranks` fresh local processes; returns the results in rank order.

    Raises what the first rank to fail raised.
    """
    port = free_port()
    with ProcessPoolExecutor(ranks, multiprocessing.get_context("spawn")) as pool:
        tasks = [pool.submit(_as_rank, rank_environment(rank, ranks, port), work, *arguments) for rank in range(ranks)]
        for task in as_completed(tasks):
            task.result()  # the first error; those of the other ranks follow from it
        return [task.result() for task in tasks]


def _as_rank(environment: dict[str, str], work: Callable[..., Any], *arguments: Any) -> Any:
    os.environ.update(environment)  # read when torch is imported
    import torch.distributed as dist

    from crate_dist.distributed import init_distributed, leave_distributed

    world = detect_world()
    device = init_distributed(world)
    try:
        result = work(world, device, *arguments)
        dist.barrier()  # nobody leaves while another one may still read what it sent
        return result
    finally:
        leave_distributed()


def parser(doc: str | None, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Returns the parser of a program, with its docstring as help and the options of `parents`."""
    return Parser(description=doc, parents=parents)


def option(name: str, **settings: Any) -> argparse.ArgumentParser:
    """Returns a parent parser with one option, as add_argument takes it."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument(name, **settings)
    return parent


def arch(default: str) -> argparse.ArgumentParser:
    """Returns a parent parser with --arch and --set, which name a recipe."""
    parent = option("--arch", default=default, metavar="NAME", help="recipe in configs/ [%(default)s]")
    parent.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE", help="of the recipe"
    )
    return parent


JSON = option("--json", type=Path, metavar="FILE", help="also write the numbers here")


def machine(*packages: str) -> dict[str, Any]:
    """Names what the numbers depend on: processor, cores, load, Python and the `packages` that are installed."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    cores = len(os.sched_getaffinity(0))
    load = [round(number, 2) for number in os.getloadavg()]
    return {"cpu": model, "cores": cores, "load": load, "python": platform.python_version(), **versions}


def in_words(facts: Mapping[str, Any]) -> str:
    """Returns what `machine` found as a line."""
    return "machine: " + ", ".join(f"{key} {value}" for key, value in facts.items())


def print_table(head: Sequence[str], rows: Iterable[Iterable[object]], formats: str = "") -> None:
    """Prints a Markdown table, each row as soon as it is known, and an empty line.

    formats: of the columns, with spaces between; a text is printed as it is
    """
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|", flush=True)
    specs = formats.split() or [""] * len(head)
    for row in rows:
        cells = (cell if isinstance(cell, str) else format(cell, s) for cell, s in zip(row, specs, strict=True))
        print("| " + " | ".join(cells) + " |", flush=True)
    print()


def write_json(path: Path | None, result: Any) -> None:
    """Writes the numbers to the file that --json names, if it does."""
    if path:
        path.write_text(json.dumps(result, indent=1), encoding="utf-8")
