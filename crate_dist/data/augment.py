"""Augments more strongly, for fine-tuning: RandAugment and random erasing, on uint8 pixels, after crop and flip.

Both follow torchvision's definitions on Pillow images (its RandAugment and RandomErasing, with defaults), but for where
the randomness comes from, which is the sample's own generator.
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

from crate_dist.config import AugmentSection, Colour
from crate_dist.data.decode import Pixels

Augmentation = Callable[[Pixels, random.Random], None]
"""A function that changes pixels (height, width, 3) in place."""

MAGNITUDES = 31
_ERASE_SCALE = (0.02, 0.33)
_ERASE_RATIO = (0.3, 3.3)
_ERASE_TRIES = 10


def augmentations(augment: AugmentSection, mean: Colour) -> tuple[Augmentation, ...]:
    """Returns what a recipe asks for beside crop and flip, in the order in which it is applied."""
    chosen: list[Augmentation] = []
    if augment.randaugment_ops:
        chosen.append(RandAugment(augment.randaugment_ops, augment.randaugment_magnitude))
    if augment.erase:
        red, green, blue = (round(255 * value) for value in mean)
        chosen.append(RandomErasing(augment.erase, (red, green, blue)))
    return tuple(chosen)


@dataclass(frozen=True)
class RandAugment:
    """`ops` operations one after the other, each drawn from all of `operations` (Cubuk et al. 2019, arXiv 1909.13719).

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
class RandomErasing:
    """Erasing, with some probability, of a rectangle of 2 to 33 % of the area (Zhong et al., arXiv 1708.04896).

    torchvision's value 0 is written after normalisation, so it is the data's mean colour; here it is the nearest one in
    whole steps of 255.
    """

    probability: float
    colour: tuple[int, int, int]

    def __call__(self, pixels: Pixels, rng: random.Random) -> None:
        if rng.random() >= self.probability:
            return
        height, width = pixels.shape[:2]
        low, high = (math.log(ratio) for ratio in _ERASE_RATIO)
        for _ in range(_ERASE_TRIES):
            area = height * width * (_ERASE_SCALE[0] + (_ERASE_SCALE[1] - _ERASE_SCALE[0]) * rng.random())
            aspect = math.exp(low + (high - low) * rng.random())
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if rows < height and columns < width:
                top = int(rng.random() * (height - rows + 1))
                left = int(rng.random() * (width - columns + 1))
                pixels[top : top + rows, left : left + columns] = self.colour
                return


@dataclass(frozen=True)
class Operation:
    """An operation of RandAugment. strengths: given to `apply`, by magnitude; signed: or their negatives, as often."""

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


def _affine(image: Image.Image, matrix: tuple[float, float, float, float, float, float]) -> Image.Image:
    """Takes each pixel (x, y) from (a x + b y + c, d x + e y + f)."""
    nearest = Image.Resampling.NEAREST
    return image.transform(image.size, Image.Transform.AFFINE, matrix, nearest, fillcolor=(0, 0, 0))


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, Image.Resampling.NEAREST, fillcolor=(0, 0, 0))
