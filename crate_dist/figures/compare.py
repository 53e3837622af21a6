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
from crate_dist.whitebox.titles import measure_title

Float = NDArray[np.float64]

_POINTS, _A_PAGE = 200, 6
_CURVES = {"loss": ("epoch", "training loss"), "top-1": ("epoch", "validation top-1 [%]")}
_LAYERS = {"coding_rate": "coding rate", "zeros": "non-zeros"}
"""What measures are called whose panels had a name before they had one each."""
MEASURES = ("coding_rate", "token_coding_rate", "zeros")
"""Those of the papers' figures, drawn when nobody names others."""


@dataclass(frozen=True)
class Measured:
    """What a run has measured: x and y, (2, n), by the names of the panels."""

    name: str
    curves: Mapping[str, Float]


def draw_comparison(
    runs: Sequence[Path], names: Sequence[str] | None, sheet: Sheet, measures: Sequence[str] = MEASURES
) -> tuple[str, list[Path]]:
    """Draws loss and top-1 over the epochs, and measures over the layers. Returns what is left out too.

    measures: as metrics.jsonl has them behind "whitebox/"; "all": all that any of the runs has
    Raises UserError: a folder is no run, or has measured nothing yet, or not what is named; names are not as many.
    """
    if names is not None and len(set(names)) != len(runs):
        raise UserError(f"--names: {len(set(names))} different names for {len(runs)} runs; give one for each")
    found = [read_run(run, name) for run, name in zip(runs, names or short_names(runs), strict=True)]
    known = list(dict.fromkeys(panel for run in found for panel in run.curves if panel not in _CURVES))
    wanted = known if "all" in measures else [_LAYERS.get(name, name) for name in measures]
    if (strange := [name for name in wanted if name not in known]) and tuple(measures) != MEASURES:
        have = ", ".join(_names(known)) or "no measures of layers yet"
        raise UserError(f"--measures {' '.join(_names(strange))}: none of the runs has measured that; they have {have}")
    labels = _CURVES | {panel: ("layer", _title(panel)) for panel in wanted}
    panels = []
    for panel, (x, y) in labels.items():
        lines = [Line(run.name, *run.curves[panel]) for run in found if panel in run.curves]
        if lines:
            panels.append(Panel(x, y, lines))
    sheet.out.mkdir(parents=True, exist_ok=True)
    pages = [panels[n : n + _A_PAGE] for n in range(0, len(panels), _A_PAGE)]
    figures = [charts(sheet, page, sheet.heading(""), shared_legend=True) for page in pages]
    numbers = {f"{run.name}/{panel}": curve for run in found for panel, curve in run.curves.items()}
    missing = [(run.name, [panel for panel in labels if panel not in run.curves]) for run in found]
    told = [f"{name} ({', '.join(lacks)})" for name, lacks in missing if lacks]
    said = f"{len(found)} runs" + (f"; not measured: {', '.join(told)}" if told else "")
    return said, [*sheet.save_pages(figures, "compare"), sheet.save_numbers(numbers, "compare")]


def _names(panels: Sequence[str]) -> list[str]:
    """Returns what metrics.jsonl calls measures."""
    return [{called: name for name, called in _LAYERS.items()}.get(panel, panel) for panel in panels]


def _title(panel: str) -> str:
    if panel == "non-zeros":
        return "non-zeros of the sparse codes [%]"
    return measure_title(*_names([panel]))


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
            measured = {key.removeprefix("whitebox/"): line[key] for key in line if key.startswith("whitebox/")}
            layers = measured or layers
        curves = {panel: np.array(values, dtype=np.float64).T for panel, values in points.items() if values}
        curves = {panel: _thinned(curve * [[epochs], [1]]) for panel, curve in curves.items() if epochs}
        for measure, of_layers in layers.items():
            values = np.array(of_layers, dtype=np.float64)
            shown = 100 - 100 * values if measure == "zeros" else values
            curves[_LAYERS.get(measure, measure)] = np.array([range(1, len(values) + 1), shown], dtype=np.float64)
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
