"""Draws several runs in one figure: their curves, and what each layer did when the run last measured it.

Of metrics.jsonl alone: no weights are opened, and a run that is still training can be looked at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crate_dist.errors import UserError
from crate_dist.figures.charts import Line, Panel, charts
from crate_dist.figures.sheet import Sheet
from crate_dist.files import whole_lines
from crate_dist.run.folder import RunFolder, runs_in

Float = NDArray[np.float64]

_POINTS = 200
_LABELS = {
    "loss": ("epoch", "training loss"),
    "top-1": ("epoch", "validation top-1 [%]"),
    "coding rate": ("layer", "coding rate of MSSA [nats]"),
    "non-zeros": ("layer", "non-zeros after ISTA [%]"),
}


@dataclass(frozen=True)
class Measured:
    """What a run has measured: x and y, (2, n), by the names of the panels."""

    name: str
    curves: Mapping[str, Float]


def draw_comparison(runs: Sequence[Path], names: Sequence[str] | None, sheet: Sheet) -> tuple[str, list[Path]]:
    """Draws loss and top-1 over the epochs, coding rate and non-zeros over the layers. Returns what is left out too.

    Raises UserError: a folder is no run, has measured nothing yet, or there are not as many names.
    """
    if names is not None and len(set(names)) != len(runs):
        raise UserError(f"--names: {len(set(names))} different names for {len(runs)} runs; give one for each")
    found = [read_run(run, name) for run, name in zip(runs, names or short_names(runs), strict=True)]
    panels = []
    for panel, labels in _LABELS.items():
        lines = [Line(run.name, *run.curves[panel]) for run in found if panel in run.curves]
        if lines:
            panels.append(Panel(*labels, lines))
    sheet.out.mkdir(parents=True, exist_ok=True)
    figure = charts(sheet, panels, sheet.heading(""), shared_legend=True)
    numbers = {f"{run.name}/{panel}": curve for run in found for panel, curve in run.curves.items()}
    missing = [f"{run.name} ({', '.join(set(_LABELS) - set(run.curves))})" for run in found if len(run.curves) < 4]
    said = f"{len(found)} runs" + (f"; not measured: {', '.join(missing)}" if missing else "")
    return said, [*sheet.save(figure, "compare"), sheet.save_numbers(numbers, "compare")]


def read_run(path: Path, name: str) -> Measured:
    """Reads the curves of a run, and its last white-box measures. Raises UserError."""
    folder = RunFolder(path)
    if not folder.recipe_file.is_file():
        inside = runs_in(path)
        raise UserError(
            f"{path} is no run: there is no recipe.toml in it; "
            + (f"the runs in it are {inside}: give them" if inside else "give the folder that --run-dir made")
        )
    points: dict[str, list[tuple[float, float]]] = {"loss": [], "top-1": []}
    layers: dict[str, Any] = {}
    epochs = 0.0
    try:
        for line in map(json.loads, whole_lines(folder.metrics)):
            step = line["step"]
            if "train/loss" in line:
                epochs = line["train/epoch"] / step
                points["loss"].append((step, line["train/loss"]))
            if "val/top1" in line:
                points["top-1"].append((step, line["val/top1"]))
            if "whitebox/zeros" in line:
                layers = {
                    "coding rate": line["whitebox/coding_rate"],
                    "non-zeros": 100 - 100 * np.array(line["whitebox/zeros"], dtype=np.float64),
                }
        curves = {panel: np.array(values, dtype=np.float64).T for panel, values in points.items() if values}
        curves = {panel: _thinned(curve * [[epochs], [1]]) for panel, curve in curves.items() if epochs}
        for panel, values in layers.items():
            curves[panel] = np.array([range(1, len(values) + 1), values], dtype=np.float64)
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise UserError(f"{folder.metrics} is damaged: {type(error).__name__}: {error}") from error
    if not curves:
        raise UserError(f"{path} has measured nothing yet; it reports every log.every_steps steps")
    return Measured(name, curves)


def short_names(runs: Sequence[Path]) -> list[str]:
    """Returns the names of the runs' folders, with as many of the folders above as tell them apart."""
    parts = [Path(os.path.abspath(run)).parts for run in runs]
    if len(set(parts)) < len(parts):
        raise UserError("the same run is given twice")
    deep = next(n for n in range(1, max(map(len, parts)) + 1) if len({each[-n:] for each in parts}) == len(parts))
    return ["/".join(each[-deep:]) for each in parts]


def _thinned(curve: Float) -> Float:
    """Returns the means of a long curve (2, n) in as many pieces as a page can show."""
    if curve.shape[1] <= 2 * _POINTS:
        return curve
    return np.stack([piece.mean(axis=1) for piece in np.array_split(curve, _POINTS, axis=1)], axis=1)
