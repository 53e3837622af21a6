"""Pictures of maps, masks and curves as plain pixels: what figures are put together from, and what training shows.

numpy and Pillow alone: matplotlib takes longer to load and to draw a figure than a small model to take some steps, and
looks for fonts in places that a compute node may not have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from crate_dist.data.decode import Pixels

Float = NDArray[np.floating]
Colour = tuple[int, int, int]

BLUE, ORANGE = (31, 90, 153), (200, 80, 30)
OBJECTS = ((232, 92, 48), (44, 142, 178), (238, 184, 44), (106, 76, 147), (84, 160, 86), (160, 160, 160))
"""Colours of the first, second, … object."""
HEAT = (
    (0, 0, 4),
    (17, 10, 48),
    (50, 10, 94),
    (87, 16, 110),
    (120, 28, 109),
    (154, 40, 101),
    (188, 55, 84),
    (216, 76, 62),
    (237, 105, 37),
    (249, 142, 9),
    (251, 182, 26),
    (244, 223, 83),
    (252, 255, 164),
)
"""Colours from the least to the most, evenly spaced, of even steps in lightness (matplotlib's "inferno")."""
_FINE = 2


class Panel(NamedTuple):
    """A curve over the layers: title, mean and spread (L,), and its colour."""

    title: str
    mean: Float
    std: Float
    colour: Colour


def heat(values: Float) -> Pixels:
    """A map (rows, cols) in colours, from 0 to its largest value: uint8 (rows, cols, 3). What is no number is 0."""
    values = np.nan_to_num(np.asarray(values, dtype=np.float64))
    top = float(values.max())
    places = values / top if top > 0 else values
    known = np.linspace(0, 1, len(HEAT))
    parts = [np.interp(places, known, part) for part in zip(*HEAT, strict=True)]
    return np.round(np.stack(parts, axis=-1)).astype(np.uint8)


def lit(image: Pixels, values: Float) -> Pixels:
    """A picture, the brighter the larger a map (rows, cols) is there; dim where it is 0."""
    bright = enlarged(np.asarray(values, dtype=np.float64), image.shape[:2])[..., None]
    top = float(bright.max())
    return np.round(image * (0.15 + 0.85 * (bright / top if top > 0 else bright))).astype(np.uint8)


def masked(image: Pixels, masks: Sequence[NDArray[np.bool_]]) -> Pixels:
    """A picture, grey and dim but for its objects, which have a tint and an edge each; masks of any coarser grid."""
    grey = image.mean(axis=2, keepdims=True) * 0.35 + 20
    shown = np.repeat(grey, 3, axis=2)
    for number, mask in enumerate(masks):
        tint = np.array(OBJECTS[number % len(OBJECTS)], dtype=np.float64)
        inside = enlarged(mask, image.shape[:2])
        shown[inside] = 0.62 * image[inside] + 0.38 * tint
        edge = inside & ~_eroded(inside, max(1, min(image.shape[:2]) // 112))
        shown[edge] = tint
    return shown.clip(0, 255).astype(np.uint8)


def enlarged(values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Values on a grid of patches (rows, cols, …) for every pixel of (height, width): each patch its own."""
    rows, cols = (np.arange(size) * count // size for size, count in zip(shape[:2], values.shape[:2], strict=True))
    return values[rows][:, cols]


def tiles(rows: Sequence[Sequence[Pixels]], side: int, gap: int = 2) -> Pixels:
    """Square pictures of any sizes side by side on white, each of `side` pixels."""
    resized = [
        [np.asarray(Image.fromarray(cell).resize((side, side), Image.Resampling.NEAREST)) for cell in row]
        for row in rows
    ]
    height, width = (count * (side + gap) - gap for count in (len(rows), max(map(len, rows))))
    sheet = np.full((height, width, 3), 255, dtype=np.uint8)
    for down, row in enumerate(resized):
        for across, cell in enumerate(row):
            top, left = down * (side + gap), across * (side + gap)
            sheet[top : top + side, left : left + side] = cell
    return sheet


def panels(curves: Sequence[Panel], width: int = 330, height: int = 230) -> Pixels:
    """Curves over the layers with their spread, side by side, each `width` x `height` pixels."""
    sheet = Image.new("RGB", (len(curves) * width * _FINE, height * _FINE), "white")
    for number, curve in enumerate(curves):
        _panel(ImageDraw.Draw(sheet), curve, number * width * _FINE, width * _FINE, height * _FINE)
    return np.asarray(sheet.resize((len(curves) * width, height), Image.Resampling.BOX))


def _panel(draw: ImageDraw.ImageDraw, curve: Panel, left: int, width: int, height: int) -> None:
    font = ImageFont.load_default(11 * _FINE)
    x0, x1, y0, y1 = left + 44 * _FINE, left + width - 12 * _FINE, height - 36 * _FINE, 24 * _FINE
    low, high = float((curve.mean - curve.std).min()), float((curve.mean + curve.std).max())
    if not math.isfinite(high - low):
        draw.text((left + width // 2, height // 2), "not finite", "black", font, anchor="mm")
        return
    step = _round_step((high - low) or abs(high) or 1.0)
    low, high = math.floor(low / step) * step, max(math.ceil(high / step), math.floor(low / step) + 1) * step
    layers = len(curve.mean)

    def at(layer: int, value: float) -> tuple[float, float]:
        share = layer / (layers - 1) if layers > 1 else 0.5
        return x0 + (0.03 + 0.94 * share) * (x1 - x0), y0 - (value - low) / (high - low) * (y0 - y1)

    for tick in range(round((high - low) / step) + 1):
        value = low + tick * step
        y = at(0, value)[1]
        draw.line((x0, y, x1, y), (216, 216, 216), _FINE)
        draw.text((x0 - 5 * _FINE, y), f"{value:.6g}", "black", font, anchor="rm")
    for layer in range(0, layers, -(-layers // 12)):
        draw.text((at(layer, low)[0], y0 + 5 * _FINE), str(layer + 1), "black", font, anchor="mt")
    tint = tuple(255 - (255 - part) // 5 for part in curve.colour)
    above = [at(layer, value) for layer, value in enumerate((curve.mean + curve.std).tolist())]
    below = [at(layer, value) for layer, value in enumerate((curve.mean - curve.std).tolist())]
    mean = [at(layer, value) for layer, value in enumerate(curve.mean.tolist())]
    draw.polygon([*above, *reversed(below)], tint)
    draw.line(mean, curve.colour, 2 * _FINE)
    for (x, y), (_, top), (_, bottom) in zip(mean, above, below, strict=True):
        draw.line((x, top, x, bottom), curve.colour, _FINE)
        draw.ellipse((x - 3 * _FINE, y - 3 * _FINE, x + 3 * _FINE, y + 3 * _FINE), curve.colour)
    draw.line((x0, y1, x0, y0, x1, y0), "black", _FINE)
    draw.text(((x0 + x1) / 2, 6 * _FINE), curve.title, "black", font, anchor="mt")
    draw.text(((x0 + x1) / 2, height - 5 * _FINE), "layer", "black", font, anchor="mb")


def _round_step(extent: float) -> float:
    """1, 2 or 5 times a power of ten, such that three to eight of them are the extent."""
    power = 10.0 ** math.floor(math.log10(extent))
    return next(factor * power for factor in (2, 1, 0.5, 0.2) if extent / (factor * power) >= 3)


def _eroded(mask: NDArray[np.bool_], pixels_: int) -> NDArray[np.bool_]:
    inner = mask.copy()
    for axis in (0, 1):
        for shift in (pixels_, -pixels_):
            inner &= np.roll(mask, shift, axis)
    return inner
