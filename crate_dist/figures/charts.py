"""Draws curves side by side: over layers, over epochs, over steps; of one model, or of several in the same colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from crate_dist.figures.sheet import STYLE, Sheet

Float = NDArray[np.floating]

COLOURS = ("#1f5a99", "#c8501e", "#2f8f6b", "#6a4c93", "#c28f0e", "#b03060", "#3b9cb8", "#7d7d7d")
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
_MARKED = 30
_PANEL_HEIGHT_IN, _LEGEND_LINE_IN, _TITLE_IN = 2.15, 0.19, 0.22
_ONE_COLUMN_IN = 4.5


@dataclass(frozen=True)
class Line:
    """A curve: x and y, (n,) each; not-a-number is left out.

    spread: half the height of the band around it, (n,); each: thin curves (x, y) behind it, of which it is the mean
    style: its colour, and after eight of them its dashes; by default its place in the panel
    """

    label: str
    x: Float
    y: Float
    spread: Float | None = None
    each: Sequence[tuple[Float, Float]] = ()
    style: int | None = None


@dataclass(frozen=True)
class Panel:
    """A pair of axes with its curves. band_label, each_label: what its legend calls bands and thin curves."""

    x_label: str
    y_label: str
    lines: Sequence[Line]
    title: str = ""
    band_label: str = ""
    each_label: str = ""


@rc_context(STYLE)
def charts(sheet: Sheet, panels: Sequence[Panel], title: str = "", shared_legend: bool = False) -> Figure:
    """Draws panels in rows of two, or below each other in a narrow column.

    shared_legend: one below all of them, of the lines of all, not one below each
    A line that has one in common has one style in all panels.
    """
    across = min(len(panels), 2) if sheet.width_in > _ONE_COLUMN_IN else 1
    down = -(-len(panels) // across)
    width = sheet.width_in if across > 1 or sheet.width_in <= _ONE_COLUMN_IN else 0.6 * sheet.width_in
    labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines)) if shared_legend else []
    columns = max(1, min(len(labels), int(width * 13 / (6 + max(map(len, labels), default=1)))))
    height = _PANEL_HEIGHT_IN * down
    rows = -(-len(labels) // columns) if shared_legend else down * max(len(panel.lines) for panel in panels)
    height += _LEGEND_LINE_IN * rows + (_TITLE_IN if title else 0)
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    handles: dict[str, Any] = {}
    for axes, panel in zip(chain(grid.flat), panels, strict=False):
        for place, line in enumerate(panel.lines):
            style = labels.index(line.label) if shared_legend else place if line.style is None else line.style
            handles.setdefault(line.label, _draw(axes, line, style, panel))
        axes.set(xlabel=panel.x_label, ylabel=panel.y_label, title=panel.title)
        _set_ticks(axes, panel)
        if not shared_legend:
            _add_legend(axes, panel)
    if title:
        figure.suptitle(title, fontsize=9)
    if shared_legend:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, handlelength=2.2)
    return figure


def _draw(axes: Axes, line: Line, style: int, panel: Panel) -> Any:
    colour, dashes = COLOURS[style % len(COLOURS)], _DASHES[style // len(COLOURS) % len(_DASHES)]
    if line.spread is not None:
        axes.fill_between(line.x, line.y - line.spread, line.y + line.spread, color=colour, alpha=0.2, linewidth=0)
    for x, y in line.each:
        axes.plot(x, y, color=colour, linewidth=0.5, alpha=0.7)
    known = np.isfinite(line.y)
    marker = "o" if known.sum() <= _MARKED else None
    (drawn,) = axes.plot(
        line.x[known],
        line.y[known],
        color=colour,
        linestyle=dashes,
        linewidth=1.3 if marker else 1.0,
        marker=marker,
        markersize=3,
        label=line.label,
    )
    if not known.any():
        axes.text(0.5, 0.5, "not finite", ha="center", va="center", transform=axes.transAxes)
    return drawn


def _add_legend(axes: Axes, panel: Panel) -> None:
    """Says below a panel what its curves, bands and thin lines are."""
    for line in panel.lines[-1:]:
        if line.spread is not None:
            axes.fill_between([], [], color="0.6", alpha=0.4, linewidth=0, label=panel.band_label)
        if line.each:
            axes.plot([], [], color="0.4", linewidth=0.5, label=panel.each_label)
    columns = 1 if len(panel.lines) > 1 else 2
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=columns, handlelength=2.2)


def _set_ticks(axes: Axes, panel: Panel) -> None:
    """Counts layers and steps in whole numbers."""
    places = np.concatenate([line.x for line in panel.lines])
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=np.allclose(places, places.round(), atol=1e-6)))
