"""Draws maps, masks and curves as plain pixels, for figures and for TensorBoard while training.

numpy and Pillow alone: matplotlib takes longer to load and to draw a figure than a small model to take some steps, and
looks for fonts in places that a compute node may not have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from crate_dist.data.decode import Pixels
from crate_dist.whitebox.measures import Profile

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
_PROFILE = (660, 230)


def heat(values: Float) -> Pixels:
    """Colours a map (rows, cols) from 0 to its largest value: uint8 (rows, cols, 3). What is no number is 0."""
    values = np.nan_to_num(np.asarray(values, dtype=np.float64))
    top = float(values.max())
    places = values / top if top > 0 else values
    known = np.linspace(0, 1, len(HEAT))
    parts = [np.interp(places, known, part) for part in zip(*HEAT, strict=True)]
    return np.round(np.stack(parts, axis=-1)).astype(np.uint8)


def lit(image: Pixels, values: Float) -> Pixels:
    """Shows a picture, the brighter the larger a map (rows, cols) is there; dim where it is 0."""
    bright = enlarged(np.asarray(values, dtype=np.float64), image.shape[:2])[..., None]
    top = float(bright.max())
    return np.round(image * (0.15 + 0.85 * (bright / top if top > 0 else bright))).astype(np.uint8)


def masked(image: Pixels, masks: Sequence[NDArray[np.bool_]]) -> Pixels:
    """Shows a picture, grey and dim but for its objects, each with a tint; masks of any coarser grid."""
    grey = image.mean(axis=2, keepdims=True) * 0.35 + 20
    shown = np.repeat(grey, 3, axis=2)
    for number, mask in enumerate(masks):
        tint = np.array(OBJECTS[number % len(OBJECTS)], dtype=np.float64)
        inside = enlarged(mask, image.shape[:2])
        shown[inside] = 0.62 * image[inside] + 0.38 * tint
    return shown.clip(0, 255).astype(np.uint8)


def enlarged(values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Gives every pixel of (height, width) its patch's value, of a grid (rows, cols, …)."""
    rows, cols = (np.arange(size) * count // size for size, count in zip(shape[:2], values.shape[:2], strict=True))
    return values[rows][:, cols]


def layer_profile(seen: Profile, note: str = "", width: int = 660) -> Pixels:
    """Draws the coding rate that the mixer reads and the non-zeros of the codes, over the layers, with their spread.

    Figure 3 of arXiv 2306.01129. A model without subspaces shows the tokens' own rate; one without codes says so.
    note: behind both titles; width: pixels. Some 6 ms, where matplotlib takes 200.
    """
    height = round(width * _PROFILE[1] / _PROFILE[0])
    sheet = Image.new("RGB", (width * _FINE, height * _FINE), "white")
    draw, unit = ImageDraw.Draw(sheet), width * _FINE / _PROFILE[0]
    name, of = ("coding_rate", seen.mixer) if "coding_rate" in seen else ("token_coding_rate", "the tokens")
    rate, middle = seen.mean(name).numpy(), _PROFILE[0] / 2
    _curve(draw, 0, unit, f"coding rate of {of} [nats]{note}", rate, seen.std(name).numpy(), BLUE)
    if "zeros" in seen:
        title, nonzero = f"non-zeros after {seen.tokenwise} [%]{note}", 100 - 100 * seen.mean("zeros").numpy()
        _curve(draw, middle, unit, title, nonzero, 100 * seen.std("zeros").numpy(), ORANGE)
    else:
        words, place = seen.missing["zeros"].replace(" (", "\n("), (1.5 * middle * unit, _PROFILE[1] / 2 * unit)
        draw.text(place, words, "black", ImageFont.load_default(11 * unit), anchor="mm", align="center")
    return np.asarray(sheet.resize((width, height), Image.Resampling.BOX))


def _curve(
    draw: ImageDraw.ImageDraw, left: float, unit: float, title: str, mean: Float, std: Float, colour: Colour
) -> None:
    """Draws mean and spread (L,) in the half of the sheet that begins at `left` units, of `unit` pixels each."""
    font, thin = ImageFont.load_default(11 * unit), round(unit)
    width, height = _PROFILE[0] / 2, _PROFILE[1]
    x0, x1, y0, y1 = (length * unit for length in (left + 44, left + width - 12, height - 36, 24))
    low, high = float((mean - std).min()), float((mean + std).max())
    if not math.isfinite(high - low):
        draw.text(((left + width / 2) * unit, height / 2 * unit), "not finite", "black", font, anchor="mm")
        return
    step = _round_step((high - low) or abs(high) or 1.0)
    low, high = math.floor(low / step) * step, max(math.ceil(high / step), math.floor(low / step) + 1) * step
    layers = len(mean)

    def at(layer: int, value: float) -> tuple[float, float]:
        share = layer / (layers - 1) if layers > 1 else 0.5
        return x0 + (0.03 + 0.94 * share) * (x1 - x0), y0 - (value - low) / (high - low) * (y0 - y1)

    for tick in range(round((high - low) / step) + 1):
        value = low + tick * step
        y = at(0, value)[1]
        draw.line((x0, y, x1, y), (216, 216, 216), thin)
        draw.text((x0 - 5 * unit, y), f"{value:.6g}", "black", font, anchor="rm")
    for layer in range(0, layers, -(-layers // 12)):
        draw.text((at(layer, low)[0], y0 + 5 * unit), str(layer + 1), "black", font, anchor="mt")
    tint = tuple(255 - (255 - part) // 5 for part in colour)
    above, below, middle = (
        [at(layer, value) for layer, value in enumerate(values.tolist())] for values in (mean + std, mean - std, mean)
    )
    draw.polygon([*above, *reversed(below)], tint)
    draw.line(middle, colour, 2 * thin)
    for x, y in middle:
        draw.ellipse((x - 3 * unit, y - 3 * unit, x + 3 * unit, y + 3 * unit), colour)
    draw.line((x0, y1, x0, y0, x1, y0), "black", thin)
    draw.text(((x0 + x1) / 2, 6 * unit), title, "black", font, anchor="mt")
    axis = "layer; band: ± 1 standard deviation over the images"
    draw.text(((x0 + x1) / 2, (height - 5) * unit), axis, "black", font, anchor="mb")


def _round_step(extent: float) -> float:
    """Returns 1, 2 or 5 times a power of ten, such that three to eight of them are the extent."""
    power = 10.0 ** math.floor(math.log10(extent))
    return next(factor * power for factor in (2, 1, 0.5, 0.2) if extent / (factor * power) >= 3)
