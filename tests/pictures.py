"""Pictures that look like photographs to a codec, and their encodings."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from crate_dist.data.decode import Pixels


def photo(width: int, height: int, seed: int = 0) -> Pixels:
    """Smooth fields in several sizes, edges and a little noise, uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3))
    for cells, weight in ((3, 1.0), (12, 0.5), (50, 0.25)):
        coarse = rng.random((cells, cells, 3), dtype=np.float32)
        for channel in range(3):
            field = Image.fromarray(coarse[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            picture[..., channel] += weight * np.asarray(field)
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    picture[(x - width / 3) ** 2 + (y - height / 2) ** 2 < (height / 4) ** 2] += rng.random(3) - 0.5
    picture = 255 * picture / 1.75 + rng.normal(0, 4, picture.shape)
    return picture.clip(0, 255).astype(np.uint8)


def encode(image: Image.Image | Pixels, form: str = "JPEG", **options: Any) -> bytes:
    """The file of a picture in Pillow's format `form`, with Pillow's options."""
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, form, **options)
    return buffer.getvalue()


def with_scans(data: bytes, count: int) -> bytes:
    """A progressive JPEG whose last scan comes `count` times."""
    scan = data.rindex(b"\xff\xda")
    return data[:scan] + data[scan:-2] * count + data[-2:]


def psnr_db(pixels: Pixels, reference: Pixels) -> float:
    """Peak signal-to-noise ratio in dB; 99 for equal pictures."""
    error = float(((pixels.astype(float) - reference) ** 2).mean())
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))
