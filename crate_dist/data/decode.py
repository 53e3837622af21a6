"""The bytes of one image -> RGB pixels: fast for the JPEGs that training reads, exact for everything else.

    decode_crop    libjpeg-turbo (the simplejpeg wheel), no more of the picture than a crop needs
    open_image     Pillow: every other format, and JPEGs that libjpeg-turbo has anything to say against

Which of the two decodes depends on the bytes alone. Both run the same accurate integer DCT and "fancy" chroma
upsampling, so they agree to the bit wherever both are built from libjpeg-turbo, as the wheels are. No torch here:
data preparation imports this module.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from crate_dist.config import ResizeFilter

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels, the last two outside"""

MAX_PIXELS = 64 * 1024 * 1024
"""Larger images are refused before they are decoded: no photograph, but perhaps a decompression bomb."""
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
"""What Pillow may open; it would also run external programs for EPS."""

_START_OF_FRAME, _START_OF_SCAN = 0xC0, 0xDA
_END_OF_IMAGE = b"\xff\xd9"
_UNWRITTEN = np.array([1, 254, 77], dtype=np.uint8)
_UPSAMPLING_ROWS = 4  # chroma upsampling looks one chroma row, two pixels, past the last row


class BadImage(ValueError):
    """Bytes that do not decode to a picture."""


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG that decode_crop takes, None for what Pillow is to look at. Raises BadImage."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    refuse_bomb(width, height)
    return (width, height) if colours in ("YCbCr", "Gray", "RGB") else None


def decode_crop(data: bytes, size: tuple[int, int], box: Box, shrink: int = 1) -> Pixels | None:
    """The crop `box` of a JPEG, uint8 of shape (height / shrink, width / shrink, 3); None where Pillow is to decide.

    size: what jpeg_size returned; shrink: 1, 2, 4 or 8, pixels of the image per pixel of the result, averaged in the
    DCT domain. The sides of the box must be multiples of it.

    The rows below the crop are left out by lowering the height in the frame header. libjpeg-turbo then warns of the
    scan's unread rest, so that its warnings say nothing any more; they do not need to, as Pillow, which would be asked
    next, only refuses files that end too early, and the end is looked at here.
    """
    left, top, right, bottom = box
    width, height = size
    rows = min(height, bottom + _UPSAMPLING_ROWS * shrink)
    frame = _single_scan_frame(data) if rows < height and data.endswith(_END_OF_IMAGE) else 0
    if frame:
        data = b"".join((data[: frame + 5], rows.to_bytes(2, "big"), data[frame + 7 :]))
    else:
        rows = height
    pixels = np.empty((-(-rows // shrink), -(-width // shrink), 3), dtype=np.uint8)
    pixels[-1] = _UNWRITTEN  # of a fatal error that follows a warning, simplejpeg tells nothing either
    least = pixels.shape[:2] if shrink > 1 else (0, 0)
    try:
        decoded = simplejpeg.decode_jpeg(data, min_height=least[0], min_width=least[1], buffer=pixels, strict=not frame)
    except ValueError:
        return None
    if decoded.shape != pixels.shape or (pixels[-1] == _UNWRITTEN).all():
        return None
    return pixels[top // shrink : bottom // shrink, left // shrink : right // shrink]


def open_image(data: bytes) -> Image.Image:
    """Opens with Pillow, without decoding. Raises BadImage for no image, an unknown format, too many pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise BadImage(f"not an image of a known format; it starts with {data[:8]!r}") from None
    except Image.DecompressionBombError as error:
        raise BadImage(f"refused as a decompression bomb: {_reason(error)}") from error
    except Exception as error:  # Pillow's parsers raise whatever the bytes make them trip over
        raise BadImage(f"not an image: {_reason(error)}") from error
    refuse_bomb(image.width, image.height)
    return image


def resized_exactly(
    image: Image.Image, box: Box, size: tuple[int, int], resize_filter: ResizeFilter = "bicubic"
) -> Pixels:
    """The crop `box` resized to `size` (width, height) by Pillow's antialiased filter, uint8 (height, width, 3).

    Transparency is dropped and 16 bits become their upper 8. Raises BadImage when the image does not decode.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(_rgb(image).crop(box).resize(size, Image.Resampling[resize_filter.upper()]))
    except Exception as error:
        raise BadImage(f"does not decode: {_reason(error)}") from error


def refuse_bomb(width: int, height: int) -> None:
    """Raises BadImage for more pixels than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels are refused as a decompression bomb")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):  # convert() would clip 16 bits to 8
        image = Image.fromarray((np.asarray(image).clip(0, 0xFFFF) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def _single_scan_frame(data: bytes) -> int:
    """Offset of the frame header of a baseline JPEG whose only scan has all components; 0 where there is none.

    Only there do rows stand in the file in their order.
    """
    frame, place = 0, 2
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker < _START_OF_FRAME or marker == 0xFF:  # legal padding, too rare to follow
            return 0
        if marker == _START_OF_FRAME:
            frame = place
        elif marker == _START_OF_SCAN:
            return frame if frame and data[place + 4] == data[frame + 9] else 0
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return 0


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
