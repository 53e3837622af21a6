"""Draws tables of pictures for a page of text 6.3 inches wide, set in the type of the formulas.

Drawn with matplotlib's Agg renderer through its objects: there is no global figure, no backend is chosen for anyone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from crate_dist.data.decode import Pixels
from crate_dist.files import written_whole
from crate_dist.whitebox.pixels import HEAT, heat, lit

Float = NDArray[np.floating]

TEXT_WIDTH_IN = 6.3
DPI = 300
_STYLE: Any = {"font.family": "STIXGeneral", "font.size": 9, "axes.linewidth": 0.6, "ytick.major.width": 0.6}
_HEAT_MAP = LinearSegmentedColormap.from_list("heat", [tuple(part / 255 for part in colour) for colour in HEAT])
_GAP_IN, _LABEL_IN, _TITLE_IN, _BAR_IN = 0.05, 0.22, 0.2, 0.62


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG at 300 dots per inch, whole or not at all."""
    with rc_context(_STYLE), written_whole(path) as file:
        FigureCanvasAgg(figure).print_figure(file, format="png", dpi=DPI)


def attention_grid(image: Pixels, maps: Float) -> Figure:
    """Draws attention maps (L, h, rows, cols) of one picture: rows are layers, columns heads, the first their mean."""
    layers, heads = maps.shape[:2]
    cells = [[lit(image, each.mean(axis=0)), *map(heat, each)] for each in maps]
    columns = ["mean on input", *(f"head {head + 1}" for head in range(heads))]
    return picture_table(cells, columns, [f"layer {layer + 1}" for layer in range(layers)], bar=True)


@rc_context(_STYLE)
def picture_table(
    cells: Sequence[Sequence[Pixels]],
    columns: Sequence[str],
    rows: Sequence[str] = (),
    notes: Sequence[Sequence[str]] = (),
    bar: bool = False,
) -> Figure:
    """Draws pictures in rows and titled columns. notes: a line below each; bar: the scale of `heat` at the right.

    Laid out in inches, cell by cell: columns of one width, every row as high as its first picture.
    """
    left = _LABEL_IN if rows else 0.02
    right = _BAR_IN if bar else 0.02
    below = 0.16 if notes else 0.0
    width = min((TEXT_WIDTH_IN - left - right + _GAP_IN) / len(columns) - _GAP_IN, 1.7)
    shapes = [row[0].shape for row in cells]
    heights = [width * shape[0] / shape[1] for shape in shapes]
    total = _TITLE_IN + sum(heights) + (len(cells) - 1) * _GAP_IN + len(cells) * below + 0.02
    figure = Figure(figsize=(left + len(columns) * (width + _GAP_IN) - _GAP_IN + right, total))
    across, down = figure.get_size_inches()
    y = total - _TITLE_IN
    for number, row in enumerate(cells):
        y -= heights[number]
        for column, cell in enumerate(row):
            x = left + column * (width + _GAP_IN)
            if number == 0:
                title, size = _label(columns[column], width)
                figure.text((x + width / 2) / across, 1 - 0.05 / down, title, ha="center", va="top", fontsize=size)
            axes = figure.add_axes((x / across, y / down, width / across, heights[number] / down))
            axes.imshow(cell, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
            if notes:
                note = notes[number][column]
                figure.text((x + width / 2) / across, (y - 0.03) / down, note, ha="center", va="top", fontsize=7)
        if rows:
            title, size = _label(rows[number], heights[number])
            x, middle, turn = 0.1 / across, (y + heights[number] / 2) / down, 90 if " " in title else 0
            figure.text(x, middle, title, ha="center", va="center", rotation=turn, fontsize=size)
        y -= below + _GAP_IN
    corner: dict[str, Any] = {"va": "top", "fontsize": 6}
    if rows and " " not in _label(rows[0], heights[0])[0]:  # numbers alone: say of what
        figure.text(0.1 / across, 1 - 0.05 / down, rows[0].split()[0], ha="center", **corner)
    if bar and " " not in _label(columns[-1], width)[0]:
        figure.text(1 - (right - 0.06) / across, 1 - 0.05 / down, columns[-1].split()[0], ha="left", **corner)
    if bar:
        _scale(figure, across, down, total)
    return figure


def _label(text: str, room_in: float) -> tuple[str, float]:
    """Returns the part of a title such as "head 12" that fits, at worst the number or first word, and its size."""
    if room_in > 0.4:
        return text, 8 if room_in > 0.55 else 6
    first, *_, last = text.split() if " " in text else (text, text)
    return last if last.isdigit() else first, 6


def _scale(figure: Figure, across: float, down: float, total: float) -> None:
    length = min(1.8, total - _TITLE_IN - 0.1)
    x, y = across - _BAR_IN + 0.1, (total - _TITLE_IN - length) / 2
    axes = figure.add_axes((x / across, y / down, 0.09 / across, length / down))
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), _HEAT_MAP), cax=axes, ticks=[0, 0.5, 1] if length > 0.4 else [0, 1]
    )
    bar.ax.tick_params(labelsize=7 if length > 0.4 else 5, length=2)
    if total > 0.75:
        bar.set_label("attention / max", fontsize=7)
    bar.outline.set_linewidth(0.5)
