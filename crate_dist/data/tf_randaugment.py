"""RandAugment as CRATE-α was fine-tuned with it: what its TensorFlow code computes, in NumPy.

That code is big_vision's, changed to be more like timm's. As timm's increasing set it has 15 operations, applied in
half of the cases, with normal noise on the magnitude. What is its own, as published:

    noise      drawn once for each of `ops`, and not held below 10
    contrast   towards a grey of height * width / 256, 196 at 224 pixels, for the mean of the picture
    translate  up to 100 pixels, whatever the size of the picture
    affine     sampled at pixels' corners; a pixel that is not wholly inside takes the fill colour
    rounding   down, where Pillow rounds to the nearest
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crate_dist.data.decode import Pixels
from crate_dist.data.randaugment import Fill, normal

_APPLIED = 0.5
_PER_LEVEL = np.float32(10)
Float = np.float32
Matrix = tuple[float | Float, float | Float, float | Float, float | Float, float | Float, float | Float]


@dataclass(frozen=True)
class TFRandAugment:
    """`ops` of the operations one after the other, each applied in half of the cases.

    magnitude: from 0 to 10; std: of the normal noise on it; fill: the colour where nothing is
    """

    ops: int
    magnitude: float
    std: float
    fill: Fill

    def __call__(self, pixels: Pixels, rng: random.Random) -> None:
        for _ in range(self.ops):
            operation = OPERATIONS[int(rng.random() * len(OPERATIONS))]
            noise = self.std * normal(rng) if self.std else 0.0
            if rng.random() < _APPLIED:
                strength = operation.strength(Float(self.magnitude + noise))
                if operation.signed and rng.random() >= 0.5:
                    strength = -strength
                pixels[:] = operation.apply(pixels, strength, self.fill)


@dataclass(frozen=True)
class TFOperation:
    """An operation. strength: of a magnitude, given to `apply`; signed: or its negative, as often."""

    name: str
    apply: Callable[[Pixels, Any, Fill], Pixels]
    strength: Callable[[Float], Float | int] = lambda _: 0
    signed: bool = False


def _share(most: float) -> Callable[[Float], Float]:
    return lambda level: level / _PER_LEVEL * Float(most)


def _whole(most: int, bound: int) -> Callable[[Float], int]:
    return lambda level: min(bound, int(level / _PER_LEVEL * Float(most)))


def _blend(degenerate: Pixels, image: Pixels, factor: Float) -> Pixels:
    """Returns degenerate + factor (image - degenerate), rounded down."""
    if factor == 0:
        return degenerate
    if factor == 1:
        return image
    low = degenerate.astype(Float)
    mixed = low + factor * (image.astype(Float) - low)
    return (mixed if 0 < factor < 1 else mixed.clip(0, 255)).astype(np.uint8)


def _enhanced(degenerate: Callable[[Pixels], Pixels]) -> Callable[[Pixels, Float, Fill], Pixels]:
    return lambda image, by, _: _blend(degenerate(image), image, max(Float(0.1), Float(1) + by))


def _grey(image: Pixels) -> Pixels:
    red, green, blue = np.moveaxis(image.astype(Float) * Float(1 / 255), 2, 0)
    light = red * Float(0.2989) + green * Float(0.587) + blue * Float(0.114)
    whole = (light * Float(255.5)).astype(np.uint8)
    return np.repeat(whole[..., None], 3, axis=2)


def _published_mean(image: Pixels) -> Pixels:
    """The sum of a histogram's counts over 256, which is the number of pixels and knows nothing of their values."""
    height, width, _ = image.shape
    return np.full_like(image, min(height * width // 256, 255))


def _smooth(image: Pixels) -> Pixels:
    """Pillow's smoothing kernel; the border stays."""
    height, width, _ = image.shape
    values, total = image.astype(Float), np.zeros((height - 2, width - 2, 3), dtype=Float)
    for y in range(3):
        for x in range(3):
            weight = Float(5 if (y, x) == (1, 1) else 1) / Float(13)
            total += values[y : y + height - 2, x : x + width - 2] * weight
    smooth = image.copy()
    smooth[1:-1, 1:-1] = total.clip(0, 255).astype(np.uint8)
    return smooth


def _autocontrast(image: Pixels, *_: object) -> Pixels:
    out = image.copy()
    for channel in range(3):
        values = image[..., channel].astype(Float)
        low, high = values.min(), values.max()
        if high > low:
            scale = Float(255) / (high - low)
            out[..., channel] = (values * scale + -low * scale).clip(0, 255).astype(np.uint8)
    return out


def _equalize(image: Pixels, *_: object) -> Pixels:
    out = image.copy()
    for channel in range(3):
        counts = np.bincount(image[..., channel].ravel(), minlength=256)
        step = (counts.sum() - counts[counts.nonzero()[0][-1]]) // 255
        if step:
            table = np.concatenate([[0], ((counts.cumsum() + step // 2) // step)[:-1]]).clip(0, 255)
            out[..., channel] = table[image[..., channel]]
    return out


def _posterize(image: Pixels, dropped: int, _: Fill) -> Pixels:
    shift = np.uint8(min(4 + dropped, 7))  # TensorFlow shifts a byte by no more
    return image >> shift << shift


def _solarize(image: Pixels, lowered: int, _: Fill) -> Pixels:
    threshold = np.uint8((256 - lowered) % 256)  # a byte as published
    return np.where(image < threshold, image, np.uint8(255) - image)


def _solarize_add(image: Pixels, more: int, _: Fill) -> Pixels:
    return np.where(image < 128, (image.astype(int) + more).clip(0, 255), image).astype(np.uint8)


def _rotate(image: Pixels, degrees: Float, fill: Fill) -> Pixels:
    height, width = (Float(side - 1) for side in image.shape[:2])
    radians = degrees * Float(math.pi / 180)
    cos, sin = np.cos(radians), np.sin(radians)
    x = (width - (cos * width - sin * height)) / Float(2)
    y = (height - (sin * width + cos * height)) / Float(2)
    return _affine(image, (cos, -sin, x, sin, cos, y), fill)


def _affine(image: Pixels, matrix: Matrix, fill: Fill) -> Pixels:
    """Takes each pixel (x, y) from (a x + b y + c, d x + e y + f), bilinear, with black outside; see the module."""
    height, width, _ = image.shape
    a, b, c, d, e, f = (Float(number) for number in matrix)
    y, x = np.mgrid[:height, :width].astype(Float)
    from_x, from_y = a * x + b * y + c, d * x + e * y + f
    left, top = np.floor(from_x), np.floor(from_y)
    padded = np.zeros((height + 4, width + 4, 4), dtype=Float)
    padded[2:-2, 2:-2, :3], padded[2:-2, 2:-2, 3] = image, 1
    column, row = (left.clip(-2, width) + 2).astype(int), (top.clip(-2, height) + 2).astype(int)
    right_weight, bottom_weight = (from_x - left)[..., None], (from_y - top)[..., None]
    left_weight, top_weight = (left + Float(1) - from_x)[..., None], (top + Float(1) - from_y)[..., None]
    above = left_weight * padded[row, column] + right_weight * padded[row, column + 1]
    below = left_weight * padded[row + 1, column] + right_weight * padded[row + 1, column + 1]
    sampled: NDArray[np.uint8] = (top_weight * above + bottom_weight * below).astype(np.uint8)
    return np.where(sampled[..., 3:] == 0, np.array(fill, dtype=np.uint8), sampled[..., :3])


OPERATIONS = (
    TFOperation("AutoContrast", _autocontrast),
    TFOperation("Equalize", _equalize),
    TFOperation("Invert", lambda image, *_: 255 - image),
    TFOperation("Rotate", _rotate, _share(30), True),
    TFOperation("Posterize", _posterize, _whole(4, 4)),
    TFOperation("Solarize", _solarize, _whole(256, 256)),
    TFOperation("SolarizeAdd", _solarize_add, _whole(110, 128)),
    TFOperation("Color", _enhanced(_grey), _share(0.9), True),
    TFOperation("Contrast", _enhanced(_published_mean), _share(0.9), True),
    TFOperation("Brightness", _enhanced(np.zeros_like), _share(0.9), True),
    TFOperation("Sharpness", _enhanced(_smooth), _share(0.9), True),
    TFOperation("ShearX", lambda image, x, fill: _affine(image, (1, x, 0, 0, 1, 0), fill), _share(0.3), True),
    TFOperation("ShearY", lambda image, y, fill: _affine(image, (1, 0, 0, y, 1, 0), fill), _share(0.3), True),
    TFOperation("TranslateX", lambda image, x, fill: _affine(image, (1, 0, x, 0, 1, 0), fill), _share(100), True),
    TFOperation("TranslateY", lambda image, y, fill: _affine(image, (1, 0, 0, 0, 1, y), fill), _share(100), True),
)
