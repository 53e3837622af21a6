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

from scipy import stats

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
Runs = dict[str, dict[int, float]]
"""Top-1 by seed and step."""


def collect(work: Path) -> dict[str, Any]:
    """Top-1 after each epoch of every run in the folder, finished or not, by contestant and seed; and what it means.

    Reads WORK/<contestant>-seed<N>/metrics.jsonl. Differences are taken at each step that two seeds or more of both
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
    """Every step at which one of their runs was evaluated."""
    return sorted({step for runs in contestants for run in runs.values() for step in run})


def values(runs: Runs, step: int) -> list[float]:
    """Top-1 of the seeds that have reached a step."""
    return [run[step] for run in runs.values() if step in run]


def difference(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Of the means: its standard error, and its 95 % interval for unequal variances (Welch 1947)."""
    parts = [statistics.variance(values) / len(values) for values in (a, b)]
    error = math.sqrt(sum(parts))
    freedom = sum(parts) ** 2 / sum(part**2 / (len(v) - 1) for part, v in zip(parts, (a, b), strict=True))
    half = float(stats.t.ppf(0.975, freedom)) * error
    apart = statistics.mean(a) - statistics.mean(b)
    return {"difference": apart, "standard_error": error, "low": apart - half, "high": apart + half}


def tables(result: dict[str, Any]) -> str:
    """As Markdown."""
    lines: list[str] = []
    for title, names in GROUPS.items():
        there = {name: result["runs"][name] for name in names if name in result["runs"]}
        if there:
            steps = steps_of(there.values())
            lines += [f"| {title}: top-1, % | {' | '.join(f'step {step}' for step in steps)} |"]
            lines += ["|---" * (len(steps) + 1) + "|", *rows(there, steps)]
            for pair, found in result["differences"].items():
                first, _, other = pair.partition(" - ")
                if first == names[0]:
                    cells = [shown(found[step]) if step in found else "" for step in steps]
                    lines.append(f"| {NAMES[first]} - {NAMES[other]} | {' | '.join(cells)} |")
            lines += [""]
    return "\n".join([*lines, *(equal_table(result["equal"]) if result["equal"] else [])])


def rows(contestants: dict[str, Runs], steps: Sequence[int]) -> list[str]:
    """One for each run, then the mean and the standard deviation over the seeds of each contestant."""
    lines = []
    for name, runs in contestants.items():
        for seed, run in runs.items():
            cells = [f"{run[step]:.2f}" if step in run else "" for step in steps]
            lines.append(f"| {NAMES[name]}, seed {seed} | {' | '.join(cells)} |")
    for name, runs in contestants.items():
        columns = [values(runs, step) for step in steps]
        cells = [f"{statistics.mean(c):.2f} ({statistics.stdev(c):.2f})" if len(c) > 1 else "" for c in columns]
        lines.append(f"| {NAMES[name]}, mean (standard deviation) | {' | '.join(cells)} |")
    return lines


def shown(found: dict[str, float]) -> str:
    """A difference of means with its standard error and its interval."""
    return f"{found['difference']:+.2f} ± {found['standard_error']:.2f} ({found['low']:+.1f} to {found['high']:+.1f})"


def equal_table(found: dict[str, Any]) -> list[str]:
    """The largest differences from the published code on the same batches, as the lines of a Markdown table."""
    marks = list(found["losses"]["ours"])
    head = [f"loss, to step {mark}" for mark in marks]
    head += ["logits before", f"after {found['steps']} steps", f"same answer for {found['images']:,} images then, %"]
    lines = [f"| difference from the published code | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for name, label in (("ours", "crate-dist"), ("control", "itself, weights changed in the last bit")):
        cells = [f"{found['losses'][name][mark]:.1g}" for mark in marks]
        cells += [f"{found[when][name]['logits']:.1g}" for when in ("before", "after")]
        lines.append(f"| {label} | {' | '.join([*cells, format(found['after'][name]['same_percent'], '.1f')])} |")
    return lines


def draw(result: dict[str, Any], path: Path) -> None:
    """The curves side by side: a line for each seed, a thick one for their mean."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    looks = (("tab:blue", "-"), ("tab:orange", "-"), ("tab:green", "--"))
    panels = {title: [name for name in names if name in result["runs"]] for title, names in GROUPS.items()}
    panels = {title: names for title, names in panels.items() if names}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.4), squeeze=False)
    for axis, (title, names) in zip(axes[0], panels.items(), strict=True):
        for name, (colour, line) in zip(names, looks, strict=False):
            runs: Runs = result["runs"][name]
            for run in runs.values():
                axis.plot(run.keys(), run.values(), color=colour, linewidth=0.6, alpha=0.6)
            steps = [step for step in steps_of([runs]) if len(values(runs, step)) == len(runs)]
            means = [statistics.mean(values(runs, step)) for step in steps]
            style = {"marker": "o", "markersize": 3, "linewidth": 1.6, "color": colour, "linestyle": line}
            axis.plot(steps, means, label=f"{NAMES[name]} ({len(runs)} seeds)", **style)
        axis.set(title=title, xlabel="step", ylabel="top-1 on the test images, %")
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
