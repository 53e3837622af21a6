"""Decodes the bytes of one image to RGB pixels: fast for the JPEGs of training, exact for everything else.

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
from crate_dist.data.tiff import tiff_pieces

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels, the last two outside"""

MAX_PIXELS = 64 * 1024 * 1024
"""Larger images are refused before they are decoded: no photograph, but perhaps a decompression bomb."""
MAX_SIDE = 65_500
"""The longest that libjpeg takes. A longer strip costs more in memory per row than in pixels."""
MAX_SCANNED_PIXELS = 10 * MAX_PIXELS
"""Pixels times scans of a JPEG: the usual ten scans of a progressive one, at every size. A file may have thousands."""
MAX_PYTHON_SAMPLES = 2 * 1024 * 1024
"""Pixels times bands of what Pillow decodes in Python, at a microsecond each: run-length BMPs, PPMs of odd depth."""
MAX_BYTES = 4 * MAX_PIXELS
"""Larger files are refused before they are read: MAX_PIXELS have that many uncompressed."""
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
"""The formats that Pillow may open; it would also run external programs for EPS."""
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".png", ".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".bmp", ".gif", ".tif", ".tiff"
)  # fmt: skip
"""The suffixes of files that are taken for images, in lower case."""

_START_OF_FRAME, _START_OF_SCAN = 0xC0, 0xDA
_START_OF_IMAGE, _END_OF_IMAGE = b"\xff\xd8", b"\xff\xd9"
_MAX_SEGMENTS = 4096  # before the picture; 255 of them may hold a colour profile
_MAX_READS = 10_000
_BYTES_PER_READ = 64  # of the picture itself, at the least; a PNG has them in chunks of 8 kB as a rule
_LEAST_SCAN = 2**16  # the pixels that the tables of a scan cost
_LEAST_TILE = 2**8  # and those that a tile of a TIFF costs, however small
_MAX_PLANES = 6
_MAX_COMMENTS = 1000  # of a PPM in plain text; for each, Pillow copies what follows
_UNWRITTEN = np.array([1, 254, 77], dtype=np.uint8)
_UPSAMPLING_ROWS = 4  # chroma upsampling looks one chroma row, two pixels, past the last row


class BadImage(ValueError):
    """Bytes that do not decode to a picture."""


class _File(io.BytesIO):
    """A file in memory for Pillow, whose parsers in Python would follow a million empty chunks, or tags that overlap.

    Raises BadImage when the header takes more reads or bytes than one may.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.reads_left, self.bytes_left = _MAX_READS, 2 * len(data) + _MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        """Reads as BytesIO does."""
        data = super().read(size)
        self.reads_left -= 1
        self.bytes_left -= len(data)
        if self.reads_left < 0 or self.bytes_left < 0:
            raise BadImage("refused as a bomb: it is in far more pieces than an image has")
        return data


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Returns (width, height) of a JPEG that decode_crop takes, None for what Pillow is to see. Raises BadImage."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    refuse_bomb(width, height)
    return (width, height) if colours in ("YCbCr", "Gray", "RGB") else None


def decode_crop(data: bytes, size: tuple[int, int], box: Box, shrink: int = 1) -> Pixels | None:
    """Decodes a JPEG's crop `box` to uint8 (height / shrink, width / shrink, 3); None where Pillow is to decide.

    size: what jpeg_size returned; shrink: 1, 2, 4 or 8, pixels of the image per pixel of the result, averaged in the
    DCT domain. The sides of the box must be multiples of it. Raises BadImage for too many scans.

    The rows below the crop are left out by lowering the height in the frame header. libjpeg-turbo then warns of the
    scan's unread rest, so that its warnings say nothing any more; they do not need to, as Pillow, which would be asked
    next, only refuses files that end too early, and the end is looked at here.
    """
    left, top, right, bottom = box
    width, height = size
    rows = min(height, bottom + _UPSAMPLING_ROWS * shrink)
    frame = _single_scan_frame(data)
    if not frame:
        _refuse_scans(data, size)
    elif rows == height or not data.endswith(_END_OF_IMAGE):
        frame = 0
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
    """Opens with Pillow, without decoding.

    Raises BadImage for no image, an unknown format, too many bytes, pixels, scans or tiles.
    """
    if len(data) > MAX_BYTES:
        raise BadImage(f"{len(data):,} bytes, more than the {MAX_BYTES:,} that an image may have")
    _refuse_tiles(data)
    several = data.startswith(_START_OF_IMAGE) and not _single_scan_frame(data)
    file = _File(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(file, formats=FORMATS)
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage(f"not an image of a known format; it starts with {data[:8]!r}") from None
    except Image.DecompressionBombError as error:
        raise BadImage(f"refused as a decompression bomb: {reason(error)}") from error
    except Exception as error:  # Pillow's parsers raise whatever the bytes make them trip over
        raise BadImage(f"not an image: {reason(error)}") from error
    refuse_bomb(image.width, image.height)
    if several:
        _refuse_scans(data, image.size)
    in_python = _decoded_in_python(data, image)
    file.reads_left = _MAX_READS + len(data) // (1 if in_python else _BYTES_PER_READ)
    file.bytes_left = MAX_BYTES
    return image


def resized_exactly(
    image: Image.Image, box: Box, size: tuple[int, int], resize_filter: ResizeFilter = "bicubic"
) -> Pixels:
    """Resizes the crop `box` to `size` (width, height) by Pillow's antialiased filter, uint8 (height, width, 3).

    Transparency is dropped and 16 bits become their upper 8. Raises BadImage when the image does not decode.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole = rgb(image)
            part = whole if box == (0, 0, *whole.size) else whole.crop(box)
            return np.asarray(part.resize(size, Image.Resampling[resize_filter.upper()]))
    except Exception as error:
        raise BadImage(f"does not decode: {reason(error)}") from error


def resized_part(
    image: Image.Image,
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    resize_filter: ResizeFilter = "bicubic",
) -> Pixels:
    """Returns the part in `box` of the whole image resized, and only that: uint8 of shape (height, width, 3).

    As resized_exactly of all of it to the bit but for rounding: the filter sees what is beside the box, whose edges
    may lie between pixels. Raises BadImage when the image does not decode.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(rgb(image).resize(size, Image.Resampling[resize_filter.upper()], box))
    except Exception as error:
        raise BadImage(f"does not decode: {reason(error)}") from error


def rgb(image: Image.Image) -> Image.Image:
    """Returns the picture in RGB: transparency is dropped, 16 bits become their upper 8. Raises what Pillow raises."""
    if image.mode == "I" or image.mode.startswith("I;16"):  # convert() would clip 16 bits to 8
        image = Image.fromarray((np.asarray(image).clip(0, 0xFFFF) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def refuse_bomb(width: int, height: int) -> None:
    """Raises BadImage for more pixels than MAX_PIXELS, or a side longer than MAX_SIDE."""
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise BadImage(f"{width} x {height} pixels are refused as a decompression bomb")


def reason(error: Exception) -> str:
    """Returns an exception of a library as one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _single_scan_frame(data: bytes) -> int:
    """Finds the frame header of a baseline JPEG whose only scan has all components: its offset, 0 for none.

    Only there do rows stand in the file in their order.
    """
    frame, place = 0, 2
    for _ in range(_MAX_SEGMENTS):
        if place + 10 > len(data) or data[place] != 0xFF:
            return 0
        marker = data[place + 1]
        if marker < _START_OF_FRAME or marker == 0xFF:  # legal padding, too rare to follow
            return 0
        if marker == _START_OF_FRAME:
            frame = place
        elif marker == _START_OF_SCAN:
            return frame if frame and data[place + 4] == data[frame + 9] else 0
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return 0


def _refuse_scans(data: bytes, size: tuple[int, int]) -> None:
    """Raises BadImage for a JPEG whose scans would take far more than its pixels. Each begins with a marker.

    That of scans which stand elsewhere, in a thumbnail or in pictures behind, is counted too: too few to matter.
    """
    scans, (width, height) = data.count(b"\xff\xda"), size
    if scans * max(width * height, _LEAST_SCAN) > MAX_SCANNED_PIXELS:
        raise BadImage(f"{scans} scans of {width} x {height} pixels are refused as a decompression bomb")


def _refuse_tiles(data: bytes) -> None:
    """Raises BadImage for a TIFF whose tiles or strips would take more than a picture may: all of each is decoded.

    Planes are no more work than the bands of a pixel, and Pillow takes few; the offsets of all may be named.
    """
    if (pieces := tiff_pieces(data)) is None:
        return
    pixels = pieces.number * max(pieces.width * pieces.height, _LEAST_TILE)
    if pixels > MAX_PIXELS or pieces.named > _MAX_PLANES * pieces.number or pieces.data_bytes > MAX_BYTES:
        raise BadImage(
            f"a TIFF of {pieces.number:,} pieces of {pieces.width} x {pieces.height} pixels, with {pieces.named:,} "
            f"named, of {pieces.data_bytes:,} bytes, is refused as a decompression bomb"
        )


def _decoded_in_python(data: bytes, image: Image.Image) -> bool:
    """Says whether Pillow will decode an image in Python, reading byte by byte. Raises BadImage for a large one."""
    decoders = {tile[0] for tile in getattr(image, "tile", ())} & Image.DECODERS.keys()
    samples = image.width * image.height * len(image.getbands())
    if decoders and samples > MAX_PYTHON_SAMPLES:
        raise BadImage(
            f"{image.width} x {image.height} pixels are refused as a decompression bomb in this form of "
            f"{image.format}, which is decoded slowly; another would do"
        )
    if "ppm_plain" in decoders and data.count(b"#") > _MAX_COMMENTS:
        raise BadImage(f"refused as a bomb: more than the {_MAX_COMMENTS:,} comments that an image may have")
    return bool(decoders)
