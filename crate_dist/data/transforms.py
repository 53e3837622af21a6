"""Decode and augment: the bytes of one image become uint8 pixels.

All randomness comes from a generator that is seeded by (seed, epoch, sample), so that a resumed run, another number
of workers or another cluster sees the same pixels. Crop and flip follow torchvision's RandomResizedCrop and
RandomHorizontalFlip; EXIF orientation is not applied, as ImageNet's users expect.
"""

from __future__ import annotations

import io
import math
import random
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crate_dist.data.order import hash64

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]

MAX_PIXELS = 64 * 1024 * 1024
"""Larger images are refused before they are decoded: no photograph, but perhaps a decompression bomb."""
_CROP_TRIES = 10


class BadImage(ValueError):
    """Bytes that do not decode to a picture."""


@dataclass(frozen=True)
class TrainTransform:
    """A random crop of random area and aspect, resized to a square, and flipped at random.

    scale: of the crop's area to the image's; ratio: of its width to its height; flip: probability
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __call__(self, data: bytes, rng: random.Random) -> Pixels:
        """Pixels of shape (size, size, 3). Raises BadImage."""
        image = _open(data)
        box = random_crop(image.width, image.height, self.scale, self.ratio, rng)
        mirrored = rng.random() < self.flip
        pixels = _resized(image, box, (self.size, self.size))
        return pixels[:, ::-1] if mirrored else pixels


@dataclass(frozen=True)
class EvalTransform:
    """The short side resized to `short_side`, then the centre square of `size`."""

    size: int
    short_side: int

    def __call__(self, data: bytes) -> Pixels:
        """Pixels of shape (size, size, 3). Raises BadImage."""
        image = _open(data)
        scale = self.short_side / min(image.width, image.height)
        width, height = max(round(image.width * scale), self.size), max(round(image.height * scale), self.size)
        resized = _resized(image, (0, 0, image.width, image.height), (width, height))
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        return resized[top : top + self.size, left : left + self.size]


def sample_rng(seed: int, epoch: int, sample: int) -> random.Random:
    """The generator of one sample in one epoch. Only `random()` is used: it is stable over Python versions."""
    return random.Random(int(hash64(seed, epoch, sample, 1)[0]))


def random_crop(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> Box:
    """(left, top, right, bottom) of a crop as torchvision's RandomResizedCrop draws it, or of its centre crop."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_CROP_TRIES):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(rng.random() * (width - crop_width + 1))
            top = int(rng.random() * (height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    aspect = min(max(width / height, ratio[0]), ratio[1])
    crop_width, crop_height = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def _open(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
    except Exception as error:  # Pillow's parsers raise whatever the bytes make them trip over
        raise BadImage(f"not an image: {_reason(error)}") from error
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{image.width} x {image.height} pixels are refused as a decompression bomb")
    return image


def _resized(image: Image.Image, box: Box, size: tuple[int, int]) -> Pixels:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rgb = image if image.mode == "RGB" else image.convert("RGB")
            return np.asarray(rgb.resize(size, Image.Resampling.BICUBIC, box=box))
    except Exception as error:
        raise BadImage(f"does not decode: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
