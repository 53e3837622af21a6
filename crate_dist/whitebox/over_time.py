"""Draws measures of all layers over the steps of a run: a panel for each measure, a colour for each layer.

Plain pixels, as in pixels.py: it is drawn while a model trains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from crate_dist.data.decode import Pixels

Float = NDArray[np.floating]
Colour = tuple[int, int, int]

SCALE = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (236, 196, 32))
"""Colours from the first layer to the last (matplotlib's "viridis", with an end that is seen on white)."""
_COLUMNS, _PANEL, _LEGEND, _FINE = 3, (440, 250), 90, 2
_MOST_POINTS = 400
_GREY, _BLACK = (222, 222, 222), (40, 40, 40)


def layers_over_time(steps: Sequence[int], measures: Mapping[str, Float]) -> Pixels:
    """Draws each of the measures, title -> (steps, layers): uint8 (height, width, 3). What is not finite has a gap."""
    layers = max(values.shape[1] for values in measures.values())
    rows = -(-len(measures) // _COLUMNS)
    width, height = _COLUMNS * _PANEL[0] + _LEGEND, rows * _PANEL[1]
    sheet = Image.new("RGB", (width * _FINE, height * _FINE), "white")
    draw = ImageDraw.Draw(sheet)
    every = -(-len(steps) // _MOST_POINTS)
    kept = np.arange(len(steps))[::-1][::every][::-1]  # the newest among them
    for number, (title, values) in enumerate(measures.items()):
        corner = (number % _COLUMNS) * _PANEL[0] * _FINE, (number // _COLUMNS) * _PANEL[1] * _FINE
        _panel(draw, corner, title, np.asarray(steps)[kept], np.asarray(values, dtype=np.float64)[kept])
    _legend(draw, _COLUMNS * _PANEL[0] * _FINE, layers)
    return np.asarray(sheet.resize((width, height), Image.Resampling.BOX))


def colour_of(layer: int, layers: int) -> Colour:
    """Returns the colour of a layer, counted from 0."""
    known = np.linspace(0, 1, len(SCALE))
    share = layer / max(layers - 1, 1)
    red, green, blue = (round(float(np.interp(share, known, part))) for part in zip(*SCALE, strict=True))
    return red, green, blue


def _panel(draw: ImageDraw.ImageDraw, corner: tuple[int, int], title: str, steps: Float, values: Float) -> None:
    font = ImageFont.load_default(11 * _FINE)
    (left, top), (width, height) = corner, (side * _FINE for side in _PANEL)
    x0, x1, y0, y1 = left + 56 * _FINE, left + width - 14 * _FINE, top + height - 38 * _FINE, top + 26 * _FINE
    draw.text(((x0 + x1) / 2, top + 6 * _FINE), title, _BLACK, font, anchor="mt")
    finite = values[np.isfinite(values)]
    if not finite.size:
        draw.text(((x0 + x1) / 2, (y0 + y1) / 2), "not finite", _BLACK, font, anchor="mm")
        return
    ticks = list(_ticks(float(finite.min()), float(finite.max())))
    low, high = ticks[0], ticks[-1]
    first, last = float(steps[0]), float(max(steps[-1], steps[0] + 1))

    def at(step: float, value: float) -> tuple[float, float]:
        return x0 + (step - first) / (last - first) * (x1 - x0), y0 - (value - low) / (high - low) * (y0 - y1)

    for value in ticks:
        y = at(first, value)[1]
        draw.line((x0, y, x1, y), _GREY, _FINE)
        draw.text((x0 - 5 * _FINE, y), f"{value:.6g}", _BLACK, font, anchor="rm")
    for step, anchor in ((first, "mt"), (last, "rt")):
        draw.text((at(step, low)[0], y0 + 5 * _FINE), f"{step:,.0f}", _BLACK, font, anchor=anchor)
    draw.text(((x0 + x1) / 2, y0 + 18 * _FINE), "step", _BLACK, font, anchor="mt")
    draw.line((x0, y1, x0, y0, x1, y0), _BLACK, _FINE)
    for layer in range(values.shape[1]):
        colour, run = colour_of(layer, values.shape[1]), list[tuple[float, float]]()
        for step, value in zip(steps, values[:, layer], strict=True):
            if math.isfinite(value):
                run.append(at(float(step), float(value)))
                continue
            _line(draw, run, colour)
            run = []
        _line(draw, run, colour)


def _line(draw: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], colour: Colour) -> None:
    if len(points) > 1:
        draw.line(points, colour, 2 * _FINE, joint="curve")
    for x, y in points if len(points) < 3 else ():
        draw.ellipse((x - 3 * _FINE, y - 3 * _FINE, x + 3 * _FINE, y + 3 * _FINE), colour)


def _legend(draw: ImageDraw.ImageDraw, left: int, layers: int) -> None:
    font, below, step = ImageFont.load_default(11 * _FINE), 26 * _FINE, 17 * _FINE
    for place, layer in enumerate(range(0, layers, -(-layers // 24))):
        y = below + place * step
        draw.line((left, y, left + 20 * _FINE, y), colour_of(layer, layers), 4 * _FINE)
        draw.text((left + 26 * _FINE, y), f"layer {layer + 1}", _BLACK, font, anchor="lm")


def _ticks(low: float, high: float) -> Iterator[float]:
    """Yields four to nine round values, of which the first is not above `low` and the last not below `high`."""
    extent = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(extent))
    step = next(factor * power for factor in (2, 1, 0.5, 0.2) if extent / (factor * power) >= 3)
    begin, end = math.floor(low / step), math.ceil(high / step)
    for number in range(begin, max(end, begin + 1) + 1):
        yield number * step
