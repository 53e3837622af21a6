"""Decodes and augments: the bytes of one image become uint8 pixels.

What a recipe adds to crop and flip is in augment.py.

All randomness comes from a generator that is seeded by (seed, epoch, sample, repeat), so that a resumed run, another
number of workers or another cluster sees the same pixels. Crop and flip follow torchvision's RandomResizedCrop and
RandomHorizontalFlip; EXIF orientation is not applied, as ImageNet's users expect.

Training takes the fast path: libjpeg-turbo for the crop, torch's antialiased resize on uint8, which computes what
Pillow does with the same fixed-point weights. Evaluation takes Pillow's, at the sizes of torchvision's Resize and
CenterCrop. Pixels may differ by a step of 1 in 255 between versions of these libraries and kinds of CPU, and not within
one installation.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from crate_dist.config import CropName, ResizeFilter
from crate_dist.data.augment import Augmentation
from crate_dist.data.decode import Box, Pixels, decode_crop, jpeg_size, open_image, resized_exactly, resized_part

_CROP_TRIES = 10
_TENSORFLOW_TRIES = 100
_SHRINK_REST = 1.5
"""The shrinking that the DCT leaves to the filter at least: 1.5 agrees with Pillow to some 49 dB, 1.0 to 42."""
_MOST_LENGTHS = 32
"""Length to width, at the most, of a photograph; of a longer picture only the crop is resized."""
_64_BITS = (1 << 64) - 1


@dataclass(frozen=True)
class TrainTransform:
    """A random crop of random area and aspect, resized to a square, flipped at random, and augmented further.

    scale: of the crop's area to the image's; ratio: of its width to its height; flip: probability; crop: whose way of
    drawing it
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    augment: tuple[Augmentation, ...] = ()
    resize_filter: ResizeFilter = "bicubic"
    crop: CropName = "torchvision"

    def __call__(self, data: bytes, rng: random.Random, out: Pixels | None = None) -> Pixels:
        """Returns pixels of shape (size, size, 3), written to `out` where it is given. Raises BadImage."""
        out = np.empty((self.size, self.size, 3), dtype=np.uint8) if out is None else out
        jpeg = jpeg_size(data)
        box, shrink, mirrored = self.draw(jpeg or open_image(data).size, rng)
        crop = decode_crop(data, jpeg, box, shrink) if jpeg else None
        if crop is None:
            pixels = resized_exactly(open_image(data), box, (self.size, self.size), self.resize_filter)
            out[:] = pixels[:, ::-1] if mirrored else pixels
        else:
            _resize(crop, mirrored, out, self.resize_filter)
        for change in self.augment:
            change(out, rng)
        return out

    def draw(self, size: tuple[int, int], rng: random.Random) -> tuple[Box, int, bool]:
        """Draws the crop of an image of `size` (width, height), its divisor while decoding, and whether it is flipped.

        A crop that is decoded smaller lies on a grid of as many pixels: the resize knows no fractions of them.
        """
        draw = random_crop if self.crop == "torchvision" else tensorflow_crop
        box = draw(*size, self.scale, self.ratio, rng)
        mirrored = rng.random() < self.flip
        side = min(box[2] - box[0], box[3] - box[1])
        shrink = next(n for n in (8, 4, 2, 1) if n == 1 or side >= n * _SHRINK_REST * self.size)
        left, top, right, bottom = (edge // shrink * shrink for edge in box)
        return (left, top, right, bottom), shrink, mirrored


@dataclass(frozen=True)
class EvalTransform:
    """The short side resized to `short_side`, then the centre square of `size`; None: all of it, stretched to fit."""

    size: int
    short_side: int | None
    resize_filter: ResizeFilter = "bicubic"

    def __call__(self, data: bytes | Image.Image, out: Pixels | None = None) -> Pixels:
        """Returns pixels of shape (size, size, 3), written to `out` where it is given. Raises BadImage."""
        image = open_image(data) if isinstance(data, bytes) else data
        width = height = self.size
        if self.short_side is not None:
            # torchvision's Resize rounds the long side down.
            width, height = (self.short_side * side // min(image.size) for side in image.size)
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        if max(width, height) > _MOST_LENGTHS * min(width, height):
            x, y = image.width / width, image.height / height
            box = (left * x, top * y, (left + self.size) * x, (top + self.size) * y)
            centre = resized_part(image, box, (self.size, self.size), self.resize_filter)
        else:
            resized = resized_exactly(image, (0, 0, image.width, image.height), (width, height), self.resize_filter)
            centre = resized[top : top + self.size, left : left + self.size]
        if out is None:
            return centre
        out[:] = centre
        return out


def sample_rng(seed: int, epoch: int, sample: int, repeat: int = 0) -> random.Random:
    """Seeds the generator of one view of a sample in one epoch.

    Only `random()` is used: it is stable over Python versions. The seed is order.hash64(seed, epoch, sample,
    1 + repeat), in Python's integers: for single numbers some 20 times as fast.
    """
    state = 0
    for part in (seed, epoch, sample, 1 + repeat):
        state = _mix(state ^ _mix((part + 0x9E3779B97F4A7C15) & _64_BITS))
    return random.Random(state)


def random_crop(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> Box:
    """Draws the (left, top, right, bottom) of a crop as torchvision's RandomResizedCrop does, or its centre crop."""
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


def tensorflow_crop(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> Box:
    """Draws the (left, top, right, bottom) of a crop as big_vision's inception_crop does, or all of the image.

    That is TensorFlow's sample_distorted_bounding_box: the ratio is uniform and not its logarithm, and so is the height
    between those of the smallest and the largest area that fit, and not the area: small crops are more frequent.
    """
    smallest, largest = (bound * width * height for bound in scale)
    for _ in range(_TENSORFLOW_TRIES):
        aspect = ratio[0] + (ratio[1] - ratio[0]) * rng.random()
        rows, most = (round(math.sqrt(area / aspect)) for area in (smallest, largest))
        if round(most * aspect) > width:
            most = int((width + 0.5 - 1e-7) / aspect)
        most = min(most, height)
        rows = min(rows, most)
        rows += int(rng.random() * (most - rows + 1))
        rows += (rows * round(rows * aspect) < smallest) - (rows * round(rows * aspect) > largest)
        columns = round(rows * aspect)
        if 0 < rows <= height and 0 < columns <= width and smallest <= rows * columns <= largest:
            top, left = int(rng.random() * (height - rows)), int(rng.random() * (width - columns))
            return left, top, left + columns, top + rows
    return 0, 0, width, height


def _resize(crop: Pixels, mirrored: bool, out: Pixels, resize_filter: ResizeFilter) -> None:
    """Resizes, antialiased, mirrored or not, uint8 (height, width, 3) to `out`, uint8 (size, size, 3)."""
    source = torch.from_numpy(np.ascontiguousarray(crop)).unsqueeze(0).permute(0, 3, 1, 2)
    resized = interpolate(source, out.shape[:2], mode=resize_filter, antialias=True)
    if mirrored:
        resized = resized.flip(3)
    torch.from_numpy(out).copy_(resized[0].permute(1, 2, 0))


def _mix(value: int) -> int:
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _64_BITS
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _64_BITS
    return value ^ (value >> 31)
