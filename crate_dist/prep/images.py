"""Converts one image on its way into a shard, or lets it pass.

A plain JPEG, colour or greyscale, passes byte for byte. Everything else becomes an RGB JPEG (grey stays grey): CMYK
and YCCK JPEGs, and other formats whatever their file is called (ImageNet has a PNG named .JPEG); where no pixel may
change, an RGB PNG. EXIF rotation is not applied, as users of ImageNet and torchvision expect; such images are counted.
Transparency and colour profiles are dropped, also as torchvision does; of an animation the first frame is taken. The
same bytes give the same bytes.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image

from crate_dist.data.decode import BadImage, open_image, reason

DEFAULT_QUALITY = 95
_ORIENTATION = 0x0112
_MAX_EXIF = 2**16  # what a JPEG has room for; the tags of a larger block may take a million times its size
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


@dataclass(frozen=True)
class ImageOptions:
    """The options of converting an image.

    short_side: larger images are resized to it, in pixels; quality: re-encode all images with this JPEG quality;
    verify: decode also those that pass byte for byte
    lossless: images that would become JPEGs become PNGs, unless `quality` is set; RGB and grey PNGs pass byte for byte
    """

    short_side: int | None = None
    quality: int | None = None
    verify: bool = False
    lossless: bool = False

    @property
    def changes_sizes(self) -> bool:
        """True when the bytes written may differ much from the bytes read."""
        return self.short_side is not None or self.quality is not None


def transcode(data: bytes, options: ImageOptions) -> tuple[bytes, list[str]]:
    """Returns the JPEG or PNG that goes into the shard, and the oddities and changes to be counted.

    Raises BadImage when the bytes are no image, are cut off, do not decode, or would be a decompression bomb. Of a
    file that passes byte for byte only headers and end are looked at, unless they look odd or `verify` is set.
    """
    if not data:
        raise BadImage("the file is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # oddities are counted, not told one by one
        try:
            return _transcode(data, options)
        except BadImage:
            raise
        except Exception as error:  # Pillow's parsers raise whatever the bytes make them trip over
            raise BadImage(f"does not decode: {reason(error)}") from error


def extension(data: bytes) -> str:
    """Returns the extension of an image that transcode returned, jpg or png."""
    return "png" if data.startswith(_PNG_START) else "jpg"


def check_decodes(data: bytes) -> None:
    """Decodes an image fully. Raises BadImage."""
    transcode(data, ImageOptions(verify=True))


def _transcode(data: bytes, options: ImageOptions) -> tuple[bytes, list[str]]:
    image = open_image(data)
    width, height = image.size
    counted = _oddities(image)
    is_jpeg = image.format in ("JPEG", "MPO")  # MPO: a JPEG with further pictures behind it
    too_large = options.short_side is not None and min(width, height) > options.short_side
    passes = is_jpeg or (options.lossless and image.format == "PNG")
    if passes and image.mode in ("RGB", "L") and options.quality is None and not too_large:
        if options.verify or not data.endswith(b"\xff\xd9" if is_jpeg else _PNG_END):
            image.load()
        return data, counted
    if options.short_side is not None and too_large:
        image = _resized(image, options.short_side)
        counted.append("resized")
    return _encoded(image, options), [*counted, "re-encoded"]


def _oddities(image: Image.Image) -> list[str]:
    counted = []
    if image.format not in ("JPEG", "MPO"):
        counted.append(str(image.format))
    elif image.mode == "CMYK":
        counted.append("CMYK")
    if image.mode in ("1", "L", "LA"):
        counted.append("greyscale")
    if 0 < len(image.info.get("exif", b"")) <= _MAX_EXIF and _orientation(image) in range(2, 9):
        counted.append("EXIF rotation (not applied)")
    return counted


def _orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # a broken EXIF block does not make a broken image
        return None


def _resized(image: Image.Image, short_side: int) -> Image.Image:
    scale = short_side / min(image.size)
    width, height = (max(round(length * scale), short_side) for length in image.size)
    # The JPEG decoder may halve on the way, but leaves at least twice the size for the filter to work on.
    image.draft(None, (2 * width, 2 * height))
    return _rgb_or_grey(image).resize((width, height), Image.Resampling.BICUBIC)


def _rgb_or_grey(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # convert() would clip 16 bits to 8
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("1", "L"):
        return image.convert("L")
    return image.convert("RGB")


def _encoded(image: Image.Image, options: ImageOptions) -> bytes:
    out = io.BytesIO()
    if options.lossless and options.quality is None:
        _rgb_or_grey(image).save(out, format="PNG")
    else:
        _rgb_or_grey(image).save(out, format="JPEG", quality=options.quality or DEFAULT_QUALITY)
    return out.getvalue()
