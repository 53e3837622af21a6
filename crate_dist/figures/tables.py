"""Draws tables of pictures that fit a page of text: photos at their own resolution, maps, and masks with an edge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from crate_dist.data.decode import Pixels
from crate_dist.figures.sheet import STYLE, TEXT_HEIGHT_IN, Sheet
from crate_dist.whitebox.pixels import HEAT, OBJECTS, Colour, heat, lit

Float = NDArray[np.floating]
Mask = NDArray[np.bool_]

_HEAT_MAP = LinearSegmentedColormap.from_list("heat", [tuple(part / 255 for part in colour) for colour in HEAT])
_GAP_IN, _LABEL_IN, _HEAD_IN, _BAR_IN, _NOTE_IN, _LINE_IN = 0.05, 0.22, 0.2, 0.62, 0.16, 0.2
_WIDEST_IN = 1.7
_LEAST_SHARE = 0.4


@dataclass(frozen=True)
class Cell:
    """A picture, uint8 (height, width, 3), with the edges of masks (rows, cols) on it in the colours of OBJECTS."""

    pixels: Pixels
    edges: Sequence[Mask] = ()


def coloured(values: Float) -> Pixels:
    """Colours values (rows, cols) from 0 to 1 as the scale beside a table does: uint8 (rows, cols, 3)."""
    pixels: Pixels = _HEAT_MAP(values, bytes=True)[..., :3]
    return pixels


def attention_grid(sheet: Sheet, image: Pixels, maps: Float, title: str, bar: str) -> list[Figure]:
    """Draws attention maps (L, h, rows, cols) of one picture: rows are layers, columns heads, the first their mean."""
    layers, heads = maps.shape[:2]
    cells = [[Cell(lit(image, each.mean(axis=0))), *(Cell(heat(one)) for one in each)] for each in maps]
    columns = ["mean on input", *(f"head {head + 1}" for head in range(heads))]
    rows = [f"layer {layer + 1}" for layer in range(layers)]
    return picture_table(sheet, cells, columns, rows, bar=bar, title=title)


def picture_table(
    sheet: Sheet,
    cells: Sequence[Sequence[Cell]],
    columns: Sequence[str],
    rows: Sequence[str] = (),
    notes: Sequence[Sequence[str]] = (),
    bar: str = "",
    key: Sequence[tuple[Colour, str]] = (),
    title: str = "",
) -> list[Figure]:
    """Draws pictures in rows and titled columns, on as few pages as leave them two fifths of their full size.

    A row has the proportions of its first picture. One that is higher than wide is as high as a square one, unless
    most of them are: a portrait takes no more of the page than the others.
    notes: a line below each; bar: what the scale of `heat` at the right is called; key: what colours mean, below all
    """
    room_in = sheet.width_in - (_LABEL_IN if rows else 0.02) - (_BAR_IN if bar else 0.02) + _GAP_IN
    width = min(room_in / len(columns) - _GAP_IN, _WIDEST_IN)
    ratios = np.array([row[0].pixels.shape[0] / row[0].pixels.shape[1] for row in cells])
    heights = width * np.minimum(ratios, max(1.0, float(np.sort(ratios)[(len(ratios) - 1) // 2])))
    rest = TEXT_HEIGHT_IN - _HEAD_IN - 0.02 - _LINE_IN * (bool(title) + bool(key))
    each = _GAP_IN + (_NOTE_IN if notes else 0.0)
    for pages in count(1):
        parts = np.array_split(np.arange(len(cells)), pages)
        share = min(1.0, *((rest - len(part) * each) / heights[part].sum() for part in parts))
        if share >= _LEAST_SHARE or pages == len(cells):
            break
    heights *= share
    layout = _Layout(float((heights / ratios).max()), columns, bar, key, title)
    return [
        layout.draw(
            [cells[n] for n in part],
            heights[part].tolist(),
            [rows[n] for n in part] if rows else (),
            [notes[n] for n in part] if notes else (),
        )
        for part in parts
    ]


@dataclass(frozen=True)
class _Layout:
    """What the pages of a table have in common. Laid out in inches, cell by cell, in columns of one width."""

    width: float
    columns: Sequence[str]
    bar: str
    key: Sequence[tuple[Colour, str]]
    title: str

    @rc_context(STYLE)
    def draw(
        self,
        cells: Sequence[Sequence[Cell]],
        heights: Sequence[float],
        rows: Sequence[str],
        notes: Sequence[Sequence[str]],
    ) -> Figure:
        left, right = _LABEL_IN if rows else 0.02, _BAR_IN if self.bar else 0.02
        below, top = (_NOTE_IN if notes else 0.0), _LINE_IN if self.title else 0.0
        head = top + _HEAD_IN
        foot = 0.02 + (_LINE_IN if self.key else 0.0)
        total = head + sum(heights) + (len(cells) - 1) * _GAP_IN + len(cells) * below + foot
        across = left + len(self.columns) * (self.width + _GAP_IN) - _GAP_IN + right
        page = _Page.of_size(across, total)
        if self.title:
            page.text(across / 2, total - 0.04, self.title, min(9.0, 150 * across / len(self.title)), va="top")
        y = total - head
        for number, row in enumerate(cells):
            y -= heights[number]
            width = heights[number] * row[0].pixels.shape[1] / row[0].pixels.shape[0]
            for column, cell in enumerate(row):
                middle = left + column * (self.width + _GAP_IN) + self.width / 2
                if number == 0:
                    text, size = _label(self.columns[column], self.width)
                    page.text(middle, total - top - 0.05, text, size, va="top")
                page.picture(middle - width / 2, y, width, heights[number], cell)
                if notes:
                    page.text(middle, y - 0.03, notes[number][column], 7, va="top")
            if rows:
                text, size = _label(rows[number], heights[number])
                turn = 90 if " " in text else 0
                page.text(0.1, y + heights[number] / 2, text, size, va="center", rotation=turn)
            y -= below + _GAP_IN
        if rows and " " not in _label(rows[0], heights[0])[0]:  # numbers alone: say of what
            page.text(0.1, total - top - 0.05, rows[0].split()[0], 6, va="top")
        if self.bar:
            if " " not in _label(self.columns[-1], self.width)[0]:
                text, x = self.columns[-1].split()[0], across - right + 0.06
                page.text(x, total - top - 0.05, text, 6, va="top", ha="left")
            _scale(page, self.bar, foot, total - head)
        if self.key:
            marks = [Patch(facecolor=_hex(colour), label=text) for colour, text in self.key]
            size = min(8.0, 115 * across / sum(len(text) + 5 for _, text in self.key))
            page.figure.legend(
                handles=marks, loc="lower center", ncols=len(marks), fontsize=size, handlelength=1, borderpad=0
            )
        return page.figure


@dataclass(frozen=True)
class _Page:
    """A figure, and axes over all of it whose unit is an inch: one pair for every cell takes seconds to make."""

    figure: Figure
    axes: Axes

    @classmethod
    def of_size(cls, across: float, down: float) -> _Page:
        figure = Figure(figsize=(across, down))
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, across), ylim=(0, down))
        axes.set_axis_off()
        return cls(figure, axes)

    def text(self, x: float, y: float, text: str, size: float, ha: str = "center", **options: Any) -> None:
        self.axes.text(x, y, text, ha=ha, fontsize=size, **options)

    def picture(self, x: float, y: float, width: float, height: float, cell: Cell) -> None:
        self.axes.imshow(cell.pixels, aspect="auto", extent=(x, x + width, y, y + height))
        for number, mask in enumerate(cell.edges):
            lines = np.array([x, y + height]) + edges(mask) * [width, -height]
            colour = _hex(OBJECTS[number % len(OBJECTS)])
            self.axes.add_collection(LineCollection(list(lines), colors=colour, linewidths=0.9, capstyle="projecting"))

    def inset(self, x: float, y: float, width: float, height: float) -> Axes:
        across, down = self.figure.get_size_inches()
        return self.figure.add_axes((x / across, y / down, width / across, height / down))


def edges(mask: Mask) -> Float:
    """Returns the lines between what is inside a mask (rows, cols) and what is not: (lines, 2, 2), of x and y 0 … 1.

    What lies beyond the border is not inside.
    """
    rows, cols = mask.shape
    padded = np.pad(mask, 1)
    down, across = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    upright = np.stack([np.stack([across, down], axis=1), np.stack([across, down + 1], axis=1)], axis=1)
    down, across = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    level = np.stack([np.stack([across, down], axis=1), np.stack([across + 1, down], axis=1)], axis=1)
    lines: Float = np.concatenate([upright, level]) / np.array([cols, rows])
    return lines


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _label(text: str, room_in: float) -> tuple[str, float]:
    """Returns the part of a title such as "head 12" that fits, at worst the number or first word, and its size."""
    if room_in > 0.4:
        return text, 8 if room_in > 0.55 else 6
    first, *_, last = text.split() if " " in text else (text, text)
    return last if last.isdigit() else first, 6


def _scale(page: _Page, label: str, low: float, high: float) -> None:
    length = min(1.8, high - low - 0.1)
    axes = page.inset(page.figure.get_figwidth() - _BAR_IN + 0.1, (low + high - length) / 2, 0.09, length)
    ticks = [0, 0.5, 1] if length > 0.4 else [0, 1]
    bar = page.figure.colorbar(ScalarMappable(Normalize(0, 1), _HEAT_MAP), cax=axes, ticks=ticks)
    axes.tick_params(labelsize=7 if length > 0.4 else 5, length=2)
    if length > 0.6:
        bar.set_label(label, fontsize=7)
    bar.outline.set_linewidth(0.5)
