"""Reads pictures to look at: from image files, a folder, a tensor file or a split of shards, as a model reads them."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from crate_dist.config import ImageSection
from crate_dist.data.decode import IMAGE_SUFFIXES, BadImage, Pixels, open_image, resized_exactly
from crate_dist.data.index import ShardIndex
from crate_dist.data.loader import Normalize, eval_transform
from crate_dist.data.reader import ShardReader
from crate_dist.errors import UserError

ORIGINAL_PIXELS = 1024
"""More than a figure shows at 600 dots per inch."""
_MOST_LENGTHS = 8


class PictureError(UserError):
    """A picture that cannot be used, which the message names, or none at all."""


@dataclass(frozen=True)
class Picture:
    """A picture as a model reads it, and as it was.

    pixels: uint8 (height, width, 3); tensor: the same normalised, fp32 (3, height, width)
    original: the whole of it at its own resolution, uint8, its short side of ORIGINAL_PIXELS at most
    """

    name: str
    pixels: Pixels
    tensor: Tensor
    original: Pixels


@dataclass(frozen=True)
class Framing:
    """The way from an image to pixels whose sides are whole patches.

    side: pixels, a multiple of `patch`. square: what evaluation sees, as `prepared` has it; otherwise the whole image,
    its short side as long, its proportions kept up to half a patch; cut: of the image the square in its middle.
    Raises PictureError when `side` is no multiple.
    """

    side: int
    patch: int
    square: bool
    prepared: ImageSection
    cut: bool = False

    def __post_init__(self) -> None:
        if self.side % self.patch or self.side < self.patch:
            lower = max(self.side // self.patch * self.patch, self.patch)
            raise PictureError(
                f"a side of {self.side} pixels is no whole number of patches of {self.patch}; "
                f"{lower} or {lower + self.patch} would be"
            )

    def __call__(self, data: bytes) -> Pixels:
        """Returns the image as uint8 (height, width, 3). Raises BadImage."""
        if self.square:
            return eval_transform(self.prepared, self.side)(data)
        image = self._opened(data)
        return self._whole(image, self.size(*image.size))

    def picture(self, data: bytes, name: str) -> Picture:
        """Reads an image file. Raises BadImage."""
        if self.square:
            pixels = original = self(data)
        else:
            image = self._opened(data)
            most = min(1.0, ORIGINAL_PIXELS / min(image.size))
            pixels = self._whole(image, self.size(*image.size))
            original = self._whole(image, (round(image.width * most), round(image.height * most)))
        normalize = Normalize(self.prepared.mean, self.prepared.std, torch.device("cpu"), torch.float32)
        return Picture(name, pixels, normalize(torch.from_numpy(pixels.copy())[None])[0], original)

    def _opened(self, data: bytes) -> Image.Image:
        image = cut_square(open_image(data)) if self.cut else open_image(data)
        if max(image.size) > _MOST_LENGTHS * min(image.size):
            raise BadImage(f"{image.width} x {image.height} pixels, more than {_MOST_LENGTHS} times as long as wide")
        return image

    def _whole(self, image: Image.Image, size: tuple[int, int]) -> Pixels:
        return resized_exactly(image, (0, 0, image.width, image.height), size, self.prepared.resize_filter)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Returns (width, height) of the whole image in whole patches."""
        patches = self.side / self.patch / min(width, height)
        return max(round(width * patches), 1) * self.patch, max(round(height * patches), 1) * self.patch


def cut_square(image: Image.Image) -> Image.Image:
    """Returns the largest square in the middle of an image."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image if image.width == image.height else image.crop((left, top, left + side, top + side))


def read_mask(path: Path, shape: tuple[int, int], cut: bool = False) -> NDArray[np.bool_]:
    """Reads a mask file, not zero where the object is, at the size of its picture: bool of `shape` (height, width).

    cut: takes the square in its middle, as of its picture
    Raises PictureError when it is no image, or has other proportions than the picture.
    """
    try:
        image = cut_square(open_image(path.read_bytes())) if cut else open_image(path.read_bytes())
        values = np.asarray(image if image.mode in ("1", "L", "P", "I", "I;16") else image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise PictureError(f"the mask {path} cannot be used: {getattr(error, 'strerror', None) or error}") from error
    height, width = shape
    if abs(image.width / image.height * height / width - 1) > 0.1:
        raise PictureError(f"the mask {path} is {image.width} x {image.height}; its picture has other proportions")
    marked = Image.fromarray(values.reshape(image.height, image.width, -1).any(axis=2))
    return np.asarray(marked.resize((width, height), Image.Resampling.NEAREST))


def from_paths(paths: Sequence[Path], framing: Framing, count: int) -> list[Picture]:
    """Reads the first `count` pictures of files and folders, the latter's in the order of their names.

    A `.pt` file holds images as the model reads them, a tensor (b, 3, height, width) or {"imgs": tensor}, the input
    of the published vis_utils; they are taken as they are.
    Raises PictureError when there are none, and at the first that cannot be used.
    """
    pictures = list(islice(_from_paths(_files(paths), framing), count))
    if not pictures:
        raise PictureError(f"no images in {', '.join(map(str, paths))}; known are {', '.join(IMAGE_SUFFIXES)} and .pt")
    return pictures


def from_split(index: ShardIndex, framing: Framing, count: int) -> list[Picture]:
    """Reads the first `count` pictures of a split in the order of its index. Raises PictureError, ShardError."""
    reader = ShardReader(index)
    pictures = []
    for sample in range(min(count, index.num_samples)):
        name = Path(reader.describe(sample, "").key).stem
        try:
            pictures.append(framing.picture(reader.read(sample), name))
        except BadImage as error:
            bad = reader.describe(sample, str(error))
            raise PictureError(f"{bad.key} of {index.place}/{bad.shard} cannot be used: {bad.reason}") from error
    return pictures


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        else:
            yield path


def _from_paths(files: Iterable[Path], framing: Framing) -> Iterator[Picture]:
    for file in files:
        if file.suffix == ".pt":
            yield from _from_tensors(file, framing)
            continue
        try:
            yield framing.picture(file.read_bytes(), file.stem)
        except (OSError, BadImage) as error:
            raise PictureError(f"{file} cannot be used: {getattr(error, 'strerror', None) or error}") from error


def _from_tensors(file: Path, framing: Framing) -> Iterator[Picture]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise PictureError(f"{file} is no file of tensors, or a damaged one: {str(error).splitlines()[0]}") from error
    images = content.get("imgs") if isinstance(content, Mapping) else content
    if (
        not isinstance(images, Tensor)
        or images.ndim != 4
        or images.shape[1] != 3
        or any(side % framing.patch or not side for side in images.shape[2:])
    ):
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise PictureError(
            f'{file}: expected a tensor (b, 3, height, width) or {{"imgs": tensor}}, with sides that are multiples of '
            f"the patch {framing.patch}, got {found}"
        )
    mean, std = (torch.tensor(values)[:, None, None] for values in (framing.prepared.mean, framing.prepared.std))
    for number, image in enumerate(images.float()):
        pixels = ((image * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        yield Picture(f"{file.stem}-{number:03d}", pixels, image, pixels)
