"""benchmarks/cifar10.py report: what the runs say, as tables with their noise, and as a figure."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
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
PAIRS = [("ours", "published-bilinear"), ("ours", "published-bicubic"), ("tuned", "scratch")]
Curves = dict[str, list[float]]


def collect(work: Path) -> dict[str, Any]:
    """Top-1 after each epoch of every run in the folder, by contestant and seed, and the last epochs' training loss.

    Reads WORK/<contestant>-seed<N>/metrics.jsonl; a run that is not at the last evaluation of the others is left out.
    """
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for path in sorted(work.glob("*-seed*/metrics.jsonl")):
        match = re.fullmatch(r"(.+)-seed(\d+)", path.parent.name)
        if not match or match[1] not in NAMES:
            continue
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        evaluated = [line for line in lines if "val/top1" in line]
        if not evaluated:
            continue
        previous = evaluated[-2]["step"] if len(evaluated) > 1 else 0
        losses = [line["train/loss"] for line in lines if "train/loss" in line and line["step"] > previous]
        found[match[1]][match[2]] = {
            "steps": [line["step"] for line in evaluated],
            "top1": [line["val/top1"] for line in evaluated],
            "val_loss": evaluated[-1]["val/loss"],
            "train_loss": statistics.mean(losses),
        }
    result: dict[str, Any] = {}
    for name in NAMES:
        longest = max((run["steps"][-1] for run in found[name].values()), default=0)
        whole = {seed: run for seed, run in found[name].items() if run["steps"][-1] == longest}
        if whole:
            result[name] = whole
    result["compared"] = {
        f"{a} - {b}": difference(finals(result[a]), finals(result[b]))
        for a, b in PAIRS
        if a in result and b in result and min(len(result[a]), len(result[b])) > 1
    }
    equal = work / "equal.json"
    result["equal"] = json.loads(equal.read_text(encoding="utf-8")) if equal.exists() else None
    return result


def finals(runs: dict[str, Any]) -> list[float]:
    """Top-1 after the last epoch, one per seed."""
    return [run["top1"][-1] for run in runs.values()]


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
    lines = []
    for group in (("ours", "published-bilinear", "published-bicubic"), ("tuned", "scratch")):
        there = [name for name in group if name in result]
        if not there:
            continue
        steps = next(iter(result[there[0]].values()))["steps"]
        lines += [f"| top-1, % | seeds | {' | '.join(f'step {step}' for step in steps)} | spread | each |"]
        lines += ["|---" * (len(steps) + 4) + "|"]
        for name in there:
            columns = list(zip(*(run["top1"] for run in result[name].values()), strict=True))
            means = " | ".join(f"{statistics.mean(column):.2f}" for column in columns)
            each = ", ".join(f"{value:.2f}" for value in finals(result[name]))
            spread = f"{statistics.stdev(columns[-1]):.2f}" if len(columns[-1]) > 1 else ""
            lines.append(f"| {NAMES[name]} | {len(result[name])} | {means} | {spread} | {each} |")
        lines += [""]
        for name in there:
            runs = result[name].values()
            both = [statistics.mean(run[key] for run in runs) for key in ("train_loss", "val_loss")]
            lines.append(f"{NAMES[name]}: training loss of the last epoch {both[0]:.4f}, test loss {both[1]:.4f}")
        lines += [""]
    for pair, found in result["compared"].items():
        a, _, b = pair.partition(" - ")
        lines.append(
            f"{NAMES[a]} - {NAMES[b]}: {found['difference']:+.2f} points, "
            f"standard error {found['standard_error']:.2f}, 95 % interval {found['low']:+.2f} to {found['high']:+.2f}"
        )
    if result["equal"]:
        lines += ["", *equal_table(result["equal"])]
    return "\n".join(lines)


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
    """The curves side by side: the mean over seeds as a line, each seed as a thin one."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = [
        ("CIFAR-10 from scratch", ("published-bilinear", "ours")),
        ("five other classes, two epochs", ("scratch", "tuned")),
    ]
    panels = [(title, names) for title, names in panels if any(name in result for name in names)]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.4), squeeze=False)
    for axis, (title, names) in zip(axes[0], panels, strict=True):
        for name, colour, style in zip(names, ("tab:orange", "tab:blue"), ("-", "--"), strict=True):
            if name not in result:
                continue
            runs = list(result[name].values())
            for run in runs:
                axis.plot(run["steps"], run["top1"], color=colour, linewidth=0.6, alpha=0.5)
            means = [statistics.mean(column) for column in zip(*(run["top1"] for run in runs), strict=True)]
            label = f"{NAMES[name]}, {len(runs)} seeds: {means[-1]:.1f} %"
            axis.plot(
                runs[0]["steps"], means, style, color=colour, linewidth=1.8, marker="o", markersize=3, label=label
            )
        axis.set(title=title, xlabel="step", ylabel="top-1 on the test images, %")
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
