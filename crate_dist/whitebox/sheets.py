"""Draws sheets of pictures with words beside them: samples with their labels, attention with its scale.

As whitebox/pixels.py, by numpy and Pillow alone.
"""

from __future__ import annotations

import functools
import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from crate_dist.data.decode import Pixels
from crate_dist.whitebox.pixels import HEAT, Float, heat

_GAP = 6
_LINE = 14
_POINTS = 11
_BAR = 12
_GREY = (96, 96, 96)


@dataclass(frozen=True)
class Captioned:
    """A picture, uint8 (height, width, 3), and the lines below it; the first is black, others are grey."""

    pixels: Pixels
    lines: tuple[str, ...]


def captioned(pictures: Sequence[Captioned], title: str, columns: int = 6, side: int = 128) -> Pixels:
    """Puts square pictures side by side, each of `side` pixels, with its lines below, cut where they are longer."""
    lines = max(len(picture.lines) for picture in pictures)
    rows, columns = math.ceil(len(pictures) / columns), min(columns, len(pictures))
    across, down = side + _GAP, side + lines * _LINE + _GAP
    width = max(columns * across + _GAP, round(_font().getlength(title)) + 2 * _GAP)
    sheet, draw = _blank(width, _LINE + 2 * _GAP + rows * down, title)
    for number, picture in enumerate(pictures):
        left, top = _GAP + number % columns * across, _LINE + 2 * _GAP + number // columns * down
        sheet.paste(_resized(picture.pixels, side), (left, top))
        for line, text in enumerate(picture.lines):
            place = left, top + side + 1 + line * _LINE
            draw.text(place, _cut(text, side), _GREY if line else "black", _font())
    return np.asarray(sheet)


def attention(images: Iterable[Pixels], maps: Float, headings: Sequence[str], title: str, side: int = 72) -> Pixels:
    """Draws maps beside their images, coloured from the least to the most that a column has, which stand below it.

    So a column shows where its attention goes when it is close to even, as in a new model, and when it is not; what
    maps of two columns have in common is told by their numbers alone.

    images: b of them; maps: (columns, b, rows, cols), in multiples of a uniform attention; headings: of each column
    """
    shown, count = np.nan_to_num(maps, posinf=0, neginf=0), maps.shape[1]
    across, top = side + 2, 2 * _LINE + 2 * _GAP
    height, right = top + count * across + 2 * _LINE + _GAP, _GAP + (len(maps) + 1) * across
    width = max(right + _BAR + 44, round(_font().getlength(title)) + 2 * _GAP)
    sheet, draw = _blank(width, height, title)
    below = top + count * across + 2
    for row, image in enumerate(images):
        sheet.paste(_resized(image, side), (_GAP, top + row * across))
    for line, (text, colour) in enumerate((("most", HEAT[-4]), ("least", HEAT[3]))):
        draw.text((_GAP, below + line * _LINE), text, colour, _font())
    for column, (values, heading) in enumerate(zip(shown, headings, strict=True), start=1):
        left, middle = _GAP + column * across, _GAP + column * across + side / 2
        draw.text((middle, top - _LINE), heading, "black", _font(), anchor="mt")
        low, high = float(values.min()), float(values.max())
        coloured = heat((values - low).reshape(-1, values.shape[-1])).reshape(*values.shape, 3)
        for row, cell in enumerate(coloured):
            sheet.paste(_resized(cell, side), (left, top + row * across))
        texts = _told(low, high) if np.isfinite(maps[column - 1]).all() else ("not finite", "")
        for line, text in enumerate(texts):
            draw.text((middle, below + line * _LINE), text, "black", _font(), anchor="mt")
    scale = heat(np.linspace(1, 0, side)[:, None])
    bar = Image.fromarray(scale).resize((_BAR, count * across - 2), Image.Resampling.NEAREST)
    sheet.paste(bar, (right + 2, top))
    draw.text((right + _BAR + 6, top), "most", "black", _font())
    draw.text((right + _BAR + 6, below - 5), "least", "black", _font(), anchor="lb")
    return np.asarray(sheet)


def _blank(width: int, height: int, title: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), title, "black", _font())
    return sheet, draw


def _resized(pixels: Pixels, side: int) -> Image.Image:
    """Enlarges by whole pixels, so that patches stay sharp; makes smaller by their mean."""
    larger = max(pixels.shape[:2]) <= side
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST if larger else Image.Resampling.BOX)


def _cut(text: str, width: int) -> str:
    """Returns the text, or as much of it as fits into `width` pixels, with an ellipsis; the font has no accents."""
    text = "".join(part for part in unicodedata.normalize("NFKD", text) if not unicodedata.combining(part))
    while _font().getlength(text) > width:
        text = text.removesuffix("…")[:-1].rstrip(" ,") + "…"
    return text


def _told(low: float, high: float) -> tuple[str, str]:
    """Writes the most and the least with as many digits as tell them apart."""
    digits = min(max(1 - math.floor(math.log10(high - low)), 2), 5) if high > low else 2
    return f"{high:.{digits}f} x", f"{low:.{digits}f} x"


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(_POINTS)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
