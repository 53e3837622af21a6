"""Augments more strongly than crop and flip, on uint8 pixels behind these: RandAugment, colour jitter, random erasing.

Jitter and erasing follow torchvision's and timm's definitions, but for where the randomness comes from, which is the
sample's own generator; RandAugment is in randaugment.py, and tf_randaugment.py has CRATE-α's.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from crate_dist.config import AugmentSection, Colour, ImageSection
from crate_dist.data.decode import Pixels
from crate_dist.data.order import hash64
from crate_dist.data.randaugment import Fill, RandAugment, TimmRandAugment
from crate_dist.data.tf_randaugment import TFRandAugment

Augmentation = Callable[[Pixels, random.Random], None]
"""A function that changes pixels (height, width, 3) in place."""

_ERASE_TRIES = 10
_QUANTILES = 1 << 16


def augmentations(augment: AugmentSection, images: ImageSection) -> tuple[Augmentation, ...]:
    """Returns what a recipe asks for beside crop and flip, in the order in which it is applied."""
    chosen: list[Augmentation] = []
    red, green, blue = (round(255 * value) for value in images.mean)
    mean = red, green, blue
    if augment.randaugment_ops:
        chosen.append(_randaugment(augment, images, mean))
    if augment.color_jitter:
        chosen.append(ColorJitter(augment.color_jitter))
    if augment.erase and augment.erase_mode == "mean":
        chosen.append(RandomErasing(augment.erase, mean))
    elif augment.erase:
        chosen.append(NoiseErasing(augment.erase, images.mean, images.std))
    return tuple(chosen)


def _randaugment(augment: AugmentSection, images: ImageSection, mean: Fill) -> Augmentation:
    ops, magnitude, kind = augment.randaugment_ops, augment.randaugment_magnitude, augment.randaugment
    if kind == "torchvision":
        return RandAugment(ops, magnitude)
    if kind == "crate_alpha":
        return TFRandAugment(ops, magnitude, augment.randaugment_std, mean)
    increasing = kind == "timm_increasing"
    return TimmRandAugment(ops, magnitude, augment.randaugment_std, increasing, mean, images.resize_filter)


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast and saturation times a factor from 1 - strength to 1 + strength each, in random order."""

    strength: float

    def __call__(self, pixels: Pixels, rng: random.Random) -> None:
        image = Image.fromarray(pixels)
        low, high = max(0.0, 1 - self.strength), 1 + self.strength
        left = [(kind, low + (high - low) * rng.random()) for kind in _JITTERED]
        while left:
            kind, factor = left.pop(int(rng.random() * len(left)))
            image = kind(image).enhance(factor)
        pixels[:] = np.asarray(image)


_JITTERED = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@dataclass(frozen=True)
class RandomErasing:
    """Erasing, with some probability, of a rectangle of 2 to 33 % of the area (Zhong et al., arXiv 1708.04896).

    torchvision's value 0 is written after normalisation, so it is the data's mean colour; here it is the nearest one in
    whole steps of 255.
    """

    probability: float
    colour: Fill

    def __call__(self, pixels: Pixels, rng: random.Random) -> None:
        if part := _rectangle(pixels, self.probability, 0.33, (0.3, 3.3), rng):
            pixels[part] = self.colour


@dataclass(frozen=True)
class NoiseErasing:
    """timm's mode "pixel": the same with up to a third of the area, and normal noise in each colour of each pixel.

    timm writes standard normal numbers after normalisation. Here they are what normalisation makes of mean + std * z in
    whole steps of 255, some 0.017 standard deviations, and from black to white: beyond lie the outermost 2.8 to 4.0 %
    of ImageNet's colours.
    """

    probability: float
    mean: Colour
    std: Colour

    def __call__(self, pixels: Pixels, rng: random.Random) -> None:
        if part := _rectangle(pixels, self.probability, 1 / 3, (0.3, 1 / 0.3), rng):
            height, width, _ = pixels[part].shape
            key, count = int(rng.random() * (1 << 53)), 3 * height * width
            words = hash64(key, np.arange(-(-count // 4)))
            sixteen_bits = (words[:, None] >> np.arange(0, 64, 16, dtype=np.uint64)) & np.uint64(_QUANTILES - 1)
            quantiles = sixteen_bits.reshape(-1)[:count].reshape(height, width, 3)
            pixels[part] = _noise(self.mean, self.std)[quantiles, np.arange(3)]


@functools.cache
def _noise(mean: Colour, std: Colour) -> NDArray[np.uint8]:
    """Returns the quantiles of mean + std * z, z normal, as pixels, uint8 (_QUANTILES, 3)."""
    inverse = NormalDist().inv_cdf
    z = np.array([inverse((n + 0.5) / _QUANTILES) for n in range(_QUANTILES)])
    pixels: NDArray[np.uint8] = np.clip(np.rint(255 * (np.array(mean) + z[:, None] * std)), 0, 255).astype(np.uint8)
    return pixels


def _rectangle(
    pixels: Pixels, probability: float, largest: float, ratio: tuple[float, float], rng: random.Random
) -> tuple[slice, slice] | None:
    """Draws the rows and columns to be erased; None: none of them.

    largest: share of the area, the smallest is 0.02; ratio: bounds of the height to the width
    """
    if rng.random() >= probability:
        return None
    height, width = pixels.shape[:2]
    low, high = (math.log(bound) for bound in ratio)
    for _ in range(_ERASE_TRIES):
        area = height * width * (0.02 + (largest - 0.02) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if rows < height and columns < width:
            top = int(rng.random() * (height - rows + 1))
            left = int(rng.random() * (width - columns + 1))
            return slice(top, top + rows), slice(left, left + columns)
    return None
