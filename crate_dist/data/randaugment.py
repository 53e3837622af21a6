"""RandAugment (Cubuk et al. 2019, arXiv 1909.13719) on Pillow images, as torchvision and timm define it.

Given the same draws the pixels are theirs. The two differ in their operations, their strengths and what they draw:

    torchvision   14 operations, always applied; magnitude from 0 to 30; nearest pixels, black where nothing is
    timm          15 operations, each applied in half of the cases; magnitude from 0 to 10 with normal noise; filtered,
                  the data's mean colour where nothing is; "increasing": a larger magnitude is a stronger change always
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from crate_dist.config import ResizeFilter
from crate_dist.data.decode import Pixels

Fill = tuple[int, int, int]
"""Red, green and blue of what lies outside of the picture."""

Enhance = type[ImageEnhance.Color | ImageEnhance.Contrast | ImageEnhance.Brightness | ImageEnhance.Sharpness]
MAGNITUDES = 31
_MOST = 10.0
"""The largest magnitude of timm's."""
_APPLIED = 0.5
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class RandAugment:
    """torchvision's: `ops` operations one after the other, each drawn from all of `operations`.

    magnitude: from 0 to 30, the same for all
    """

    ops: int = 2
    magnitude: int = 9

    def __call__(self, pixels: Pixels, rng: random.Random) -> None:
        image = Image.fromarray(pixels)
        choice = operations(*image.size)
        for _ in range(self.ops):
            operation = choice[int(rng.random() * len(choice))]
            strength = operation.strengths[self.magnitude]
            if operation.signed and rng.random() < 0.5:
                strength = -strength
            image = operation.apply(image, strength)
        pixels[:] = np.asarray(image)


@dataclass(frozen=True)
class TimmRandAugment:
    """timm's: `ops` of the operations, drawn with replacement, each applied in half of the cases.

    magnitude: from 0 to 10; std: of the normal noise on it, drawn for each operation; increasing: the operations that
    grow stronger with it, timm's "inc1"
    """

    ops: int
    magnitude: float
    std: float
    increasing: bool
    fill: Fill
    resize_filter: ResizeFilter = "bicubic"

    def __call__(self, pixels: Pixels, rng: random.Random) -> None:
        image = Image.fromarray(pixels)
        choice = timm_operations(self.increasing)
        chosen = [choice[int(rng.random() * len(choice))] for _ in range(self.ops)]
        for operation in chosen:
            if rng.random() > _APPLIED:
                continue
            noise = self.std * normal(rng) if self.std else 0.0
            strength = operation.strength(min(max(self.magnitude + noise, 0.0), _MOST))
            if operation.signed and rng.random() > 0.5:
                strength = -strength
            image = operation.apply(image, strength, self.fill, _FILTERS[self.resize_filter])
        pixels[:] = np.asarray(image)


def normal(rng: random.Random) -> float:
    """Draws from the normal distribution, of `random()` alone (Box, Muller 1958)."""
    radius = math.sqrt(-2 * math.log(1 - rng.random()))
    return radius * math.cos(2 * math.pi * rng.random())


@dataclass(frozen=True)
class Operation:
    """An operation of torchvision's. strengths: by magnitude, given to `apply`; signed: or their negatives."""

    name: str
    apply: Callable[[Image.Image, float], Image.Image]
    strengths: tuple[float, ...]
    signed: bool


@functools.cache
def operations(width: int, height: int) -> tuple[Operation, ...]:
    """Returns the fourteen of torchvision's RandAugment in its order, for images of this size; uncovered is black."""

    def until(last: float, first: float = 0.0) -> tuple[float, ...]:
        return tuple(torch.linspace(first, last, MAGNITUDES).tolist())

    bits = tuple(8.0 - round(4 * n / (MAGNITUDES - 1)) for n in range(MAGNITUDES))
    return (
        Operation("Identity", lambda image, _: image, until(0.0), False),
        Operation("ShearX", lambda image, x: _affine(image, (1, x, 0, 0, 1, 0)), until(0.3), True),
        Operation("ShearY", lambda image, y: _affine(image, (1, 0, 0, y, 1, 0)), until(0.3), True),
        Operation(
            "TranslateX", lambda image, x: _affine(image, (1, 0, -int(x), 0, 1, 0)), until(150 / 331 * width), True
        ),
        Operation(
            "TranslateY", lambda image, y: _affine(image, (1, 0, 0, 0, 1, -int(y))), until(150 / 331 * height), True
        ),
        Operation("Rotate", _rotate, until(30.0), True),
        Operation("Brightness", lambda image, more: ImageEnhance.Brightness(image).enhance(1 + more), until(0.9), True),
        Operation("Color", lambda image, more: ImageEnhance.Color(image).enhance(1 + more), until(0.9), True),
        Operation("Contrast", lambda image, more: ImageEnhance.Contrast(image).enhance(1 + more), until(0.9), True),
        Operation("Sharpness", lambda image, more: ImageEnhance.Sharpness(image).enhance(1 + more), until(0.9), True),
        Operation("Posterize", lambda image, bits: ImageOps.posterize(image, int(bits)), bits, False),
        Operation(
            "Solarize",
            lambda image, threshold: ImageOps.solarize(image, math.ceil(threshold)),
            until(0.0, 255.0),
            False,
        ),
        Operation("AutoContrast", lambda image, _: ImageOps.autocontrast(image), until(0.0), False),
        Operation("Equalize", lambda image, _: ImageOps.equalize(image), until(0.0), False),
    )


@dataclass(frozen=True)
class TimmOperation:
    """An operation of timm's. strength: of a magnitude, given to `apply`; signed: or its negative, as often."""

    name: str
    apply: Callable[[Image.Image, float, Fill, Image.Resampling], Image.Image]
    strength: Callable[[float], float] = lambda _: 0.0
    signed: bool = False


@functools.cache
def timm_operations(increasing: bool) -> tuple[TimmOperation, ...]:
    """Returns the fifteen in timm's order.

    Those of its older set posterize and solarize less with a larger magnitude, and enhance by a factor from 0.1 to 1.9,
    where 1 changes nothing; the increasing ones move away from that, to either side.
    """

    def enhance(kind: Enhance) -> TimmOperation:
        if increasing:
            return TimmOperation(
                kind.__name__, lambda image, by, *_: kind(image).enhance(max(0.1, 1 + by)), lambda m: m / 10 * 0.9, True
            )
        return TimmOperation(
            kind.__name__, lambda image, factor, *_: kind(image).enhance(factor), lambda m: m / 10 * 1.8 + 0.1
        )

    def growing(strength: Callable[[float], int], most: int) -> Callable[[float], int]:
        return (lambda m: most - strength(m)) if increasing else strength

    return (
        TimmOperation("AutoContrast", lambda image, *_: ImageOps.autocontrast(image)),
        TimmOperation("Equalize", lambda image, *_: ImageOps.equalize(image)),
        TimmOperation("Invert", lambda image, *_: ImageOps.invert(image)),
        TimmOperation("Rotate", _rotate, lambda m: m / 10 * 30, True),
        TimmOperation("Posterize", _posterize, growing(lambda m: int(m / 10 * 4), 4)),
        TimmOperation(
            "Solarize",
            lambda image, threshold, *_: ImageOps.solarize(image, int(threshold)),
            growing(lambda m: int(m / 10 * 256), 256),
        ),
        TimmOperation("SolarizeAdd", _solarize_add, lambda m: int(m / 10 * 110)),
        enhance(ImageEnhance.Color),
        enhance(ImageEnhance.Contrast),
        enhance(ImageEnhance.Brightness),
        enhance(ImageEnhance.Sharpness),
        TimmOperation(
            "ShearX", lambda image, x, *how: _affine(image, (1, x, 0, 0, 1, 0), *how), lambda m: m / 10 * 0.3, True
        ),
        TimmOperation(
            "ShearY", lambda image, y, *how: _affine(image, (1, 0, 0, y, 1, 0), *how), lambda m: m / 10 * 0.3, True
        ),
        TimmOperation(
            "TranslateX",
            lambda image, x, *how: _affine(image, (1, 0, x * image.width, 0, 1, 0), *how),
            lambda m: m / 10 * 0.45,
            True,
        ),
        TimmOperation(
            "TranslateY",
            lambda image, y, *how: _affine(image, (1, 0, 0, 0, 1, y * image.height), *how),
            lambda m: m / 10 * 0.45,
            True,
        ),
    )


def _affine(
    image: Image.Image,
    matrix: tuple[float, float, float, float, float, float],
    fill: Fill = (0, 0, 0),
    resample: Image.Resampling = Image.Resampling.NEAREST,
) -> Image.Image:
    """Takes each pixel (x, y) from (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill)


def _rotate(
    image: Image.Image,
    degrees: float,
    fill: Fill = (0, 0, 0),
    resample: Image.Resampling = Image.Resampling.NEAREST,
) -> Image.Image:
    return image.rotate(degrees, resample, fillcolor=fill)


def _posterize(image: Image.Image, bits: float, *_: object) -> Image.Image:
    """Keeps so many of a value's eight bits; none is black, which Pillow's own has been refusing since version 13."""
    return image.point(3 * [value & -(1 << 8 - int(bits)) for value in range(256)])


def _solarize_add(image: Image.Image, more: float, *_: object) -> Image.Image:
    """Brightens the darker half of the values."""
    table = [min(255, value + int(more)) if value < 128 else value for value in range(256)]
    return image.point(3 * table)
