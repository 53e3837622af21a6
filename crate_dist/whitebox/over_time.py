"""Draws a measure of all layers over the steps of a run, a colour for each layer.

Plain pixels, as in pixels.py: it is drawn while a model trains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from crate_dist.data.decode import Pixels

Float = NDArray[np.floating]
Colour = tuple[int, int, int]

SCALE = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (236, 196, 32))
"""Colours from the first layer to the last (matplotlib's "viridis", with an end that is seen on white)."""
_WIDTH, _HEIGHT, _LEGEND, _FINE = 480, 300, 62, 2
_MOST_POINTS = 400
_GREY, _BLACK = (222, 222, 222), (40, 40, 40)


def layers_over_time(title: str, steps: Sequence[int], values: Float) -> Pixels:
    """Draws a measure of all layers, (steps, layers), as uint8 (height, width, 3). What is not finite has a gap."""
    sheet = Image.new("RGB", (_WIDTH * _FINE, _HEIGHT * _FINE), "white")
    draw = ImageDraw.Draw(sheet)
    kept = np.arange(len(steps))[:: -max(1, -(-len(steps) // _MOST_POINTS))][::-1]  # the newest among them
    _panel(draw, title, np.asarray(steps)[kept], np.asarray(values, dtype=np.float64)[kept])
    _legend(draw, values.shape[1])
    return np.asarray(sheet.resize((_WIDTH, _HEIGHT), Image.Resampling.BOX))


def colour_of(layer: int, layers: int) -> Colour:
    """Returns the colour of a layer, counted from 0."""
    known = np.linspace(0, 1, len(SCALE))
    share = layer / max(layers - 1, 1)
    red, green, blue = (round(float(np.interp(share, known, part))) for part in zip(*SCALE, strict=True))
    return red, green, blue


def _panel(draw: ImageDraw.ImageDraw, title: str, steps: Float, values: Float) -> None:
    font = ImageFont.load_default(13 * _FINE)
    x0, x1, y0, y1 = (side * _FINE for side in (56, _WIDTH - _LEGEND - 12, _HEIGHT - 40, 28))
    draw.text(((x0 + x1) / 2, 6 * _FINE), title, _BLACK, font, anchor="mt")
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


def _legend(draw: ImageDraw.ImageDraw, layers: int) -> None:
    font, left = ImageFont.load_default(12 * _FINE), (_WIDTH - _LEGEND) * _FINE
    draw.text((left, 6 * _FINE), "layer", _BLACK, font, anchor="lt")
    for place, layer in enumerate(range(0, layers, -(-layers // 16))):
        y = (32 + 16 * place) * _FINE
        draw.line((left, y, left + 20 * _FINE, y), colour_of(layer, layers), 4 * _FINE)
        draw.text((left + 26 * _FINE, y), str(layer + 1), _BLACK, font, anchor="lm")


def _ticks(low: float, high: float) -> Iterator[float]:
    """Yields four to nine round values, of which the first is not above `low` and the last not below `high`."""
    extent = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(extent))
    step = next(factor * power for factor in (2, 1, 0.5, 0.2) if extent / (factor * power) >= 3)
    begin, end = math.floor(low / step), math.ceil(high / step)
    for number in range(begin, max(end, begin + 1) + 1):
        yield number * step
