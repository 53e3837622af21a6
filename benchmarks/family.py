"""Which of the family learns most in the same budget? CIFAR-10, one width, several seeds of each.

    python benchmarks/family.py train --data DIR              every member, seeds 0 1 2; goes on where it was left
    python benchmarks/family.py train --data DIR --members crate vit --seeds 3 4
    python benchmarks/family.py report --figure FILE          tables and curves of what has been run

DIR holds CIFAR-10 as shards. Each member is configs/cifar10_family.toml with the model that --help lists, trained by
launch/local.py into WORK/<member>-seed<N>. What has been run already is not run again, and a run that was interrupted
goes on; more seeds or members may be added at any time. CRATE-α is reached from CRATE in the three steps of its
ablation (Yang et al. 2024, arXiv 2405.20299, table 5). ToST and CBT begin with convolutions, where the others cut
patches; so that it is the layers that differ, CRATE, CRATE-α and ViT are trained with that stem as well.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import measuring  # isort: skip
import numpy as np
from cifar10_report import Runs, difference, steps_of, values
from tqdm import tqdm

from crate_dist.figures.charts import Line, Panel, charts
from crate_dist.figures.sheet import Sheet

REPO = Path(__file__).resolve().parents[1]
SIZE = ("width=96", "depth=4", "heads=4")


@dataclass(frozen=True)
class Member:
    """A model of the comparison. stem: what it begins with; model: what of [model] is set."""

    name: str
    stem: str
    model: tuple[str, ...] = ()


ALPHA = ("tokenwise=odl", "residual=pre_norm")
VIT = ("arch=vit_tiny", *SIZE)
MEMBERS = {
    "crate": Member("CRATE", "patches"),
    "overcomplete": Member("CRATE, overcomplete", "patches", ("tokenwise=odl_coupled",)),
    "decoupled": Member("CRATE, overcomplete, decoupled", "patches", ("tokenwise=odl",)),
    "alpha": Member("CRATE-α", "patches", ALPHA),
    "vit": Member("ViT", "patches", VIT),
    "crate_convolutions": Member("CRATE", "convolutions", ("stem=convolutions",)),
    "alpha_convolutions": Member("CRATE-α", "convolutions", (*ALPHA, "stem=convolutions")),
    "tost": Member("ToST", "convolutions", ("arch=tost_tiny_12", *SIZE)),
    "cbt": Member("CBT", "convolutions", ("arch=cbt_tiny", *SIZE)),
    "vit_convolutions": Member("ViT", "convolutions", (*VIT, "stem=convolutions")),
}
"""By the name of the run; the first of each stem is what the others of that stem are compared with."""


def main() -> int:
    """Runs one step. Returns the exit status."""
    arguments = parse()
    try:
        arguments.run(arguments)
    except subprocess.CalledProcessError as error:
        print(f"error: exit status {error.returncode} of {shlex.join(error.cmd)}", file=sys.stderr)
        return 1
    return 0


def parse() -> argparse.Namespace:
    """Reads the command line."""
    members = "\n".join(f"  {key:<19} {each.name:<31} {' '.join(each.model)}" for key, each in MEMBERS.items())
    parser = measuring.parser(f"{__doc__}\nmembers, and what of [model] they set:\n{members}")
    steps = parser.add_subparsers(required=True, metavar="train | report")
    work = measuring.option("--work", type=Path, default=Path("runs/family"), metavar="DIR", help="[%(default)s]")
    for step, parents in {train: [measuring.arch("cifar10_family"), work], report: [work, measuring.JSON]}.items():
        summary = (step.__doc__ or "").partition("\n")[0]
        sub = steps.add_parser(step.__name__, help=summary, description=summary, parents=parents)
        sub.set_defaults(run=step)
        if step is train:
            sub.add_argument("--data", type=Path, required=True, metavar="DIR", help="CIFAR-10 as shards")
            sub.add_argument("--members", nargs="+", choices=list(MEMBERS), default=list(MEMBERS), metavar="NAME")
            sub.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="[0 1 2]")
            sub.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, the cores dealt out [1]")
        else:
            sub.add_argument("--figure", type=Path, metavar="FILE", help="draw the curves here: .png, .pdf or .svg")
    return parser.parse_args()


def train(arguments: argparse.Namespace) -> None:
    """Trains every member that has not been, seed by seed; the first seed of all comes first."""
    left = [(member, seed) for seed in arguments.seeds for member in arguments.members]
    left = [pair for pair in left if not (folder(arguments, *pair) / "model-last.pt").exists()]
    arguments.work.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))
    free = SimpleQueue[set[int]]()
    for job in range(arguments.jobs):
        free.put(set(cores[job :: arguments.jobs]) or {cores[job % len(cores)]})

    def one(pair: tuple[str, int]) -> None:
        mine = free.get()
        try:
            run(arguments, *pair, cores=mine)
        finally:
            free.put(mine)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        for _ in tqdm(pool.map(one, left), total=len(left), unit="run"):
            pass


def folder(arguments: argparse.Namespace, member: str, seed: int) -> Path:
    """Returns the run folder of a member and a seed."""
    place: Path = arguments.work / f"{member}-seed{seed}"
    return place


def run(arguments: argparse.Namespace, member: str, seed: int, cores: set[int]) -> None:
    """Trains one member on some cores, into a log beside its folder. Raises CalledProcessError."""
    place, settings = folder(arguments, member, seed), [f"model.{each}" for each in MEMBERS[member].model]
    command = [sys.executable, str(REPO / "launch" / "local.py"), "--arch", arguments.arch, "--ranks", "1"]
    command += ["--data", str(arguments.data.absolute()), "--run-dir", str(place), "--seed", str(seed)]
    command += [part for text in settings + arguments.overrides for part in ("--set", text)]
    threads = str(len(cores))
    search = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    began = time.monotonic()
    with place.with_suffix(".log").open("a", encoding="utf-8") as log:
        subprocess.run(
            ["taskset", "--cpu-list", ",".join(map(str, sorted(cores))), *command],
            check=True,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    tqdm.write(f"{place.name}: {time.monotonic() - began:.0f} s")


def report(arguments: argparse.Namespace) -> None:
    """Prints the table of what has been run, and draws the curves."""
    found = collect(arguments.work)
    if not found:
        sys.exit(f"error: no finished run in {arguments.work}; `train` makes them")
    rows = [
        [
            MEMBERS[member].name,
            MEMBERS[member].stem,
            f"{result['parameters'] / 1e6:.2f}",
            *(f"{run[max(run)]:.2f}" for run in result["top1"].values()),
            f"{result['mean']:.2f} ± {result['std']:.2f}",
            shown(result["less_first"]),
        ]
        for member, result in found.items()
    ]
    seeds = max((list(result["top1"]) for result in found.values()), key=len)
    for row in rows:
        row[3:-2] += [""] * (len(seeds) - len(row[3:-2]))
    head = ["CIFAR-10, top-1 in %", "stem", "parameters, M", *(f"seed {seed}" for seed in seeds)]
    head += ["mean ± std", "less CRATE of that stem"]
    measuring.print_table(head, rows)
    if arguments.figure:
        draw(found, arguments.figure)
    measuring.write_json(arguments.json, found)


def collect(work: Path) -> dict[str, Any]:
    """Reads top-1 after each epoch of every finished run; the mean of the last one over the seeds, and its noise."""
    found: dict[str, Any] = {}
    top1: dict[str, Runs] = defaultdict(dict)
    for member in MEMBERS:
        for path in sorted(work.glob(f"{member}-seed*/metrics.jsonl")):
            if (path.parent / "model-last.pt").exists():
                lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
                of_run = {line["step"]: line["val/top1"] for line in lines if "val/top1" in line}
                top1[member][path.parent.name.rpartition("-seed")[2]] = of_run
    for member, runs in top1.items():
        last = values(runs, max(steps_of([runs])))
        first = next(key for key, each in MEMBERS.items() if each.stem == MEMBERS[member].stem)
        base = values(top1.get(first, {}), max(steps_of([runs])))
        compared = member != first and min(len(last), len(base)) > 1
        found[member] = {
            "top1": runs,
            "parameters": parameters(work / f"{member}-seed{next(iter(runs))}"),
            "mean": statistics.mean(last),
            "std": statistics.stdev(last) if len(last) > 1 else 0.0,
            "less_first": difference(last, base) if compared else None,
        }
    return found


def parameters(run_folder: Path) -> int:
    """Counts the weights of a finished run."""
    from crate_dist.models.weights import load_model

    model, _ = load_model(run_folder / "model-last.pt")
    return sum(parameter.numel() for parameter in model.parameters())


def shown(found: dict[str, float] | None) -> str:
    """Returns a difference of means with its standard error."""
    return "{difference:+.2f} ± {standard_error:.2f}".format(**found) if found else ""


def draw(found: dict[str, Any], path: Path) -> None:
    """Draws top-1 over the steps, a panel for each stem: a thin line for each seed, a thick one for their mean."""
    lines: dict[str, list[Line]] = defaultdict(list)
    names = list(dict.fromkeys(MEMBERS[member].name for member in found))
    for member, result in found.items():
        runs: Runs = result["top1"]
        steps = [step for step in steps_of([runs]) if len(values(runs, step)) == len(runs)]
        means = np.array([statistics.mean(values(runs, step)) for step in steps])
        each = [(np.array(list(run), float), np.array(list(run.values()))) for run in runs.values()]
        name, style = MEMBERS[member].name, names.index(MEMBERS[member].name)
        lines[MEMBERS[member].stem].append(Line(name, np.array(steps, float), means, each=each, style=style))
    panels = [
        Panel("step", "top-1 on the test images [%]", of_stem, f"CIFAR-10, stem: {stem}", each_label="one seed")
        for stem, of_stem in lines.items()
    ]
    sheet = Sheet(path.parent, (path.suffix.removeprefix("."),))
    sheet.save(charts(sheet, panels), path.stem)


if __name__ == "__main__":
    sys.exit(main())
