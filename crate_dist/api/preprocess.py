"""From pictures, in whatever form they are at hand, to what a model reads: the pixels that evaluation makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from crate_dist.config import ImageSection
from crate_dist.data.decode import BadImage, Pixels, open_image
from crate_dist.data.loader import Normalize, eval_transform

Picture: TypeAlias = "Image.Image | np.ndarray | Tensor | bytes | str | Path"
"""Of Pillow; uint8 (height, width, 3), as a tensor (3, height, width), grey (height, width); a file's path or bytes."""


@dataclass(frozen=True)
class Preprocess:
    """The way from a picture to a model's input, bit for bit as in evaluation; a transform for any data set.

    size: side of the result in pixels; images: resizing, cropping and normalising, as a recipe's [images] has them.
    `dataclasses.replace(preprocess, size=448)` prepares at another resolution.
    """

    size: int
    images: ImageSection

    def __call__(self, picture: Picture | Sequence[Picture]) -> Tensor:
        """Returns fp32 (3, size, size) of one picture, (n, 3, size, size) of a list of n, on the CPU.

        Raises BadImage (a ValueError) for a file that is no image, TypeError for pixels that are not uint8, OSError.
        """
        if isinstance(picture, list | tuple) or (isinstance(picture, np.ndarray | Tensor) and picture.ndim == 4):
            return torch.stack([self(one) for one in picture])
        pixels = np.empty((self.size, self.size, 3), dtype=np.uint8)
        eval_transform(self.images, self.size)(as_image(picture), pixels)
        normalize = Normalize(self.images.mean, self.images.std, torch.device("cpu"), torch.float32)
        return normalize(torch.from_numpy(pixels)[None])[0]

    def pixels(self, prepared: Tensor) -> Pixels:
        """Turns (…, 3, height, width) back to what can be shown: uint8 (…, height, width, 3)."""
        mean, std = torch.tensor(self.images.mean), torch.tensor(self.images.std)
        values = prepared.detach().cpu().float().movedim(-3, -1) * std + mean
        shown: Pixels = (255 * values).round().clamp(0, 255).byte().numpy()
        return shown


def as_image(picture: Picture | Sequence[Picture]) -> Image.Image:
    """Returns one picture as an image of Pillow's, which decodes it at need. Raises as Preprocess does."""
    if isinstance(picture, Image.Image):
        if picture.mode == "F" or (picture.mode == "I" and picture.format is None):
            raise TypeError(
                f"a picture of Pillow's in mode {picture.mode} does not tell which of its values are black and white: "
                "scale them from 0 to 255, and give uint8 pixels"
            )
        return picture
    if isinstance(picture, bytes):
        return open_image(picture)
    if isinstance(picture, str | Path):
        try:
            return open_image(Path(picture).expanduser().read_bytes())
        except BadImage as error:
            raise BadImage(f"{picture}: {error}") from error
    given = type(picture).__name__
    if isinstance(picture, np.ndarray | Tensor):
        pixels = picture.detach().cpu().numpy() if isinstance(picture, Tensor) else picture
        if isinstance(picture, Tensor) and pixels.ndim == 3:
            pixels = np.moveaxis(pixels, 0, -1)
        if pixels.dtype == np.uint8 and (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
            return Image.fromarray(np.ascontiguousarray(pixels))
        given = f"{given} of {picture.dtype} and shape {tuple(picture.shape)}"
    raise TypeError(
        f"expected a picture, not {given}: an image of Pillow's, the path or the bytes of a file, uint8 pixels "
        "(height, width, 3), a uint8 tensor (3, height, width), or a list of these; pixels from 0 to 1 are to be taken "
        "times 255, as uint8"
    )
