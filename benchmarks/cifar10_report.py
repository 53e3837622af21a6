"""benchmarks/cifar10.py report: what the runs say, as tables with their noise, and as a figure."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measuring import print_table
from scipy import stats

from crate_dist.figures.charts import Line, Panel, charts
from crate_dist.figures.sheet import Sheet

NAMES = {
    "ours": "crate-dist",
    "published-bilinear": "published code",
    "published-bicubic": "published code, bicubic resize",
    "tuned": "fine-tuned",
    "scratch": "from scratch",
}
GROUPS = {
    "CIFAR-10 from scratch": ("ours", "published-bilinear", "published-bicubic"),
    "five other classes": ("tuned", "scratch"),
}
"""In each, the first is compared with each of the others."""
_STYLES = (0, 1, 10)
"""The third lies on the first, and is dashed."""
Runs = dict[str, dict[int, float]]
"""Top-1 by seed and step."""


def collect(work: Path) -> dict[str, Any]:
    """Reads top-1 after each epoch of every run, finished or not, by contestant and seed, and compares contestants.

    Of WORK/<contestant>-seed<N>/metrics.jsonl. Differences are taken at each step that two seeds or more of both
    contestants have reached, over the seeds that have.
    """
    found: dict[str, Runs] = defaultdict(dict)
    for path in sorted(work.glob("*-seed*/metrics.jsonl")):
        match = re.fullmatch(r"(.+)-seed(\d+)", path.parent.name)
        if match and match[1] in NAMES:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            top1 = {line["step"]: line["val/top1"] for line in lines if "val/top1" in line}
            if top1:
                found[match[1]][match[2]] = top1
    differences = {}
    for first, *others in GROUPS.values():
        for other in others:
            pair = [found.get(name, {}) for name in (first, other)]
            at = {step: (values(pair[0], step), values(pair[1], step)) for step in steps_of(pair)}
            at = {step: both for step, both in at.items() if min(map(len, both)) > 1}
            if at:
                differences[f"{first} - {other}"] = {step: difference(*both) for step, both in at.items()}
    equal = work / "equal.json"
    return {
        "runs": dict(found),
        "differences": differences,
        "equal": json.loads(equal.read_text(encoding="utf-8")) if equal.exists() else None,
    }


def steps_of(contestants: Iterable[Runs]) -> list[int]:
    """Returns every step at which one of their runs was evaluated."""
    return sorted({step for runs in contestants for run in runs.values() for step in run})


def values(runs: Runs, step: int) -> list[float]:
    """Returns top-1 of the seeds that have reached a step."""
    return [run[step] for run in runs.values() if step in run]


def difference(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Compares the means: standard error, and 95 % interval for unequal variances (Welch 1947)."""
    low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    error = math.hypot(stats.sem(a), stats.sem(b))
    apart = statistics.mean(a) - statistics.mean(b)
    return {"difference": apart, "standard_error": error, "low": float(low), "high": float(high)}


def print_tables(result: dict[str, Any]) -> None:
    """Prints them as Markdown."""
    for title, names in GROUPS.items():
        there = {name: result["runs"][name] for name in names if name in result["runs"]}
        steps = steps_of(there.values())
        lines = rows(there, steps)
        for pair, found in result["differences"].items():
            first, other = pair.split(" - ")
            if first == names[0]:
                lines.append([f"{NAMES[first]} - {NAMES[other]}", *(shown(found.get(step)) for step in steps)])
        if there:
            print_table([f"{title}: top-1, %", *(f"step {s}" for s in steps)], lines, "s" + " .2f" * len(steps))
    if result["equal"]:
        print_equal(result["equal"])


def rows(contestants: dict[str, Runs], steps: Sequence[int]) -> list[list[object]]:
    """Returns one for each run, then the mean and the standard deviation over the seeds of each contestant."""
    lines: list[list[object]] = [
        [f"{NAMES[name]}, seed {seed}", *(run.get(step, "") for step in steps)]
        for name, runs in contestants.items()
        for seed, run in runs.items()
    ]
    for name, runs in contestants.items():
        columns = [values(runs, step) for step in steps]
        cells = [f"{statistics.mean(c):.2f} ({statistics.stdev(c):.2f})" if len(c) > 1 else "" for c in columns]
        lines.append([f"{NAMES[name]}, mean (standard deviation)", *cells])
    return lines


def shown(found: dict[str, float] | None) -> str:
    """Returns a difference of means with its standard error and its interval, or nothing."""
    return "{difference:+.2f} ± {standard_error:.2f} ({low:+.1f} to {high:+.1f})".format(**found) if found else ""


def print_equal(found: dict[str, Any]) -> None:
    """Prints the largest differences from the published code on the same batches."""
    marks = list(found["losses"]["ours"])
    head = ["difference from the published code", *(f"loss, to step {mark}" for mark in marks), "logits before"]
    head += [f"after {found['steps']} steps", f"same answer for {found['images']:,} images then, %"]
    table = []
    for name, label in (("ours", "crate-dist"), ("control", "itself, weights changed in the last bit")):
        logits = (found[when][name]["logits"] for when in ("before", "after"))
        losses = (found["losses"][name][mark] for mark in marks)
        table.append([label, *losses, *logits, found["after"][name]["same_percent"]])
    print_table(head, table, "s" + " .1g" * (len(marks) + 2) + " .1f")


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws the curves side by side: a thin line for each seed, a thick one for their mean."""
    panels = []
    for title, names in GROUPS.items():
        lines = []
        for name, style in zip(names, _STYLES, strict=False):
            runs: Runs = result["runs"].get(name, {})
            steps = [step for step in steps_of([runs]) if len(values(runs, step)) == len(runs)]
            x, means = np.array(steps, float), np.array([statistics.mean(values(runs, step)) for step in steps])
            each = [(np.array(list(run), float), np.array(list(run.values()))) for run in runs.values()]
            lines.append(Line(f"{NAMES[name]}, mean of {len(runs)} seeds", x, means, each=each, style=style))
        lines = [line for line in lines if line.each]
        if lines:
            panels.append(Panel("step", "top-1 on the test images [%]", lines, title, each_label="one seed"))
    sheet = Sheet(path.parent, (path.suffix.removeprefix("."),))
    sheet.save(charts(sheet, panels), path.stem)
