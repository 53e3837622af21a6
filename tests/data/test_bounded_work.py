"""No image costs more time or memory than its pixels: counted by what is asked of the libraries, not timed."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crate_dist.config import ImageSection
from crate_dist.data import decode
from crate_dist.data.decode import MAX_BYTES, MAX_SCANNED_PIXELS, BadImage, Pixels, open_image
from crate_dist.data.transforms import EvalTransform, TrainTransform
from crate_dist.prep.images import ImageOptions, transcode
from crate_dist.whitebox.pictures import Framing
from tests.pictures import encode, photo, psnr_db, with_scans

WAYS: dict[str, Callable[[bytes], object]] = {
    "training": lambda data: TrainTransform(224)(data, random.Random(0)),
    "evaluation": EvalTransform(224, 256),
    "figures": Framing(224, 16, square=False, prepared=ImageSection()),
    "conversion": lambda data: transcode(data, ImageOptions(short_side=320, quality=90)),
    "verification": lambda data: transcode(data, ImageOptions(verify=True)),
}

STRIPS = [(1, 6000), (6000, 1), (1, 60_000), (60_000, 1), (40, 30_000)]


def plainly(data: bytes, size: int, short_side: int) -> Pixels:
    """What evaluation is to see: all of the picture resized, then the centre of it."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = short_side / min(image.size)
    width, height = (max(round(side * scale), size) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    whole = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    return whole[top : top + size, left : left + size]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", STRIPS)
def test_no_more_of_a_strip_is_resized_than_the_crop_needs(
    monkeypatch: pytest.MonkeyPatch, way: str, size: tuple[int, int]
) -> None:
    asked: list[int] = []
    resize = Image.Image.resize

    def spy(image: Image.Image, to: tuple[int, int], *arguments: Any, **options: Any) -> Image.Image:
        asked.append(to[0] * to[1])
        return resize(image, to, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", spy)
    data = encode(Image.new("RGB", size, (10, 200, 90)), "PNG")
    if way == "figures":
        with pytest.raises(BadImage, match="times as long as wide"):
            WAYS[way](data)
        return
    pixels = WAYS[way](data)
    if isinstance(pixels, np.ndarray):
        assert (pixels == (10, 200, 90)).all()
    assert max(asked, default=0) <= max(224 * 224, size[0] * size[1])


def test_a_strip_is_seen_as_if_all_of_it_had_been_resized() -> None:
    for number, (width, height) in enumerate([(20, 800), (900, 25), (3, 200), (1, 40)]):
        data = encode(photo(width, height, number), "PNG")
        assert psnr_db(EvalTransform(224, 256)(data), plainly(data, 224, 256)) > 45


@pytest.mark.parametrize(
    ("form", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {"quality": 80}), ("GIF", {}), ("TIFF", {})],
)
@pytest.mark.parametrize("size", [(500, 375), (300, 640), (48, 1000), (31, 990), (9, 9)])
def test_ordinary_pictures_keep_their_pixels_to_the_bit(
    form: str, options: dict[str, Any], size: tuple[int, int]
) -> None:
    data = encode(photo(*size), form, **options)
    assert np.array_equal(EvalTransform(224, 256)(data), plainly(data, 224, 256))


IN_LITTLE_MEMORY = """
import resource, sys
from crate_dist.data.transforms import EvalTransform
status = dict(line.split(":") for line in open("/proc/self/status"))
now = int(status["VmSize"].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (now + 100 * 2**20,) * 2)
for size in (1, 6000), (60000, 1), (40, 30000):
    import io
    from PIL import Image
    data = io.BytesIO()
    Image.new("RGB", size).save(data, "PNG")
    assert EvalTransform(224, 256)(data.getvalue()).shape == (224, 224, 3)
print("done")
"""


def test_a_strip_is_evaluated_in_a_hundred_megabytes() -> None:
    done = subprocess.run([sys.executable, "-c", IN_LITTLE_MEMORY], capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("way", WAYS)
def test_scans_without_end_are_refused_before_any_is_decoded(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    data = encode(photo(64, 48), progressive=True)
    each = MAX_SCANNED_PIXELS // 2**16
    bomb = with_scans(data, each)
    monkeypatch.setattr(decode.simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("decoded"))
    monkeypatch.setattr(Image.Image, "convert", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(BadImage, match=rf"{each + data.count(bytes([255, 218])) - 1} scans of 64 x 48 pixels"):
        WAYS[way](bomb)


def test_scans_are_weighed_with_the_pixels_that_each_goes_over() -> None:
    """The usual ten of a progressive JPEG are taken at every size that is taken at all."""
    data = encode(photo(64, 48), progressive=True)
    frame = data.index(b"\xff\xc2")
    assert data.count(b"\xff\xda") == 10

    def of_side(side: int, scans: int) -> bytes:
        large = data[: frame + 5] + struct.pack(">HH", side, side) + data[frame + 9 :]
        return with_scans(large, scans - 9)

    open_image(of_side(8192, 10))
    for side, scans in ((8192, 11), (2590, 101)):
        with pytest.raises(BadImage, match=f"{scans} scans of {side} x {side} pixels are refused"):
            open_image(of_side(side, scans))
    assert TrainTransform(32)(with_scans(data, 90), random.Random(0)).std() > 5


def png_in_pieces(pieces: int) -> bytes:
    whole, empty = encode(photo(50, 40), "PNG"), struct.pack(">I", 0) + b"prVt"
    return whole[:33] + (empty + struct.pack(">I", zlib.crc32(b"prVt"))) * pieces + whole[33:]


def gif_with_comment(pieces: int) -> bytes:
    whole = encode(Image.fromarray(photo(50, 40)).convert("P"), "GIF")
    tables = 13 + 3 * 2 ** ((whole[10] & 7) + 1) * (whole[10] >> 7)
    return whole[:tables] + b"\x21\xfe" + b"\x01a" * pieces + b"\0" + whole[tables:]


def tiff_with_tags(tags: int) -> bytes:
    """Each of the tags has all of the file as its value."""
    whole = encode(photo(50, 40), "TIFF")
    (first,) = struct.unpack("<L", whole[4:8])
    (own,) = struct.unpack("<H", whole[first : first + 2])
    more = b"".join(struct.pack("<HHLL", 30_000 + tag, 1, len(whole) - 8, 8) for tag in range(tags))
    entries = whole[first + 2 : first + 2 + 12 * own] + more
    return whole[:4] + struct.pack("<L", len(whole)) + whole[8:] + struct.pack("<H", own + tags) + entries + bytes(4)


def jpeg_with_segments(segments: int) -> bytes:
    whole = encode(photo(50, 40))
    return whole[:2] + b"\xff\xe5\x00\x02" * segments + whole[2:]


@pytest.mark.parametrize("make", [png_in_pieces, gif_with_comment, tiff_with_tags, jpeg_with_segments])
def test_a_header_in_a_million_pieces_is_not_followed(make: Callable[[int], bytes]) -> None:
    assert EvalTransform(32, 32)(make(3)).std() > 5
    with pytest.raises(BadImage, match="in far more pieces than an image has"):
        EvalTransform(32, 32)(make(20_000))


@pytest.mark.parametrize("size", [(20_000, 20_000), (65_501, 1), (1, 3_000_000)])
@pytest.mark.parametrize("way", WAYS)
def test_too_many_pixels_or_rows_are_refused_before_they_are_decoded(way: str, size: tuple[int, int]) -> None:
    whole = encode(Image.new("L", (8, 8)), "PNG")
    header = b"IHDR" + struct.pack(">II", *size) + whole[24:29]
    data = whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]
    with pytest.raises(BadImage, match=f"{size[0]} x {size[1]} pixels are refused as a decompression bomb|Decompr"):
        WAYS[way](data)


def test_a_file_of_more_bytes_than_its_pixels_could_have_is_not_opened() -> None:
    with pytest.raises(BadImage, match="bytes, more than the"):
        open_image(encode(photo(32, 32)) + bytes(MAX_BYTES))


def tiff(size: tuple[int, int], piece: tuple[int, int], data: bytes, form: str = "<", strips: bool = False) -> bytes:
    """A grey TIFF whose deflated tiles, or strips, are all the same bytes. form: byte order, and B for a BigTIFF."""
    order, big = form[0], form.endswith("B")
    word, number = ("Q", "Q") if big else ("L", "H")
    pieces = -(-size[0] // piece[0]) * -(-size[1] // piece[1])
    shape = {278: piece[1]} if strips else {322: piece[0], 323: piece[1]}
    tags = {256: size[0], 257: size[1], 258: 8, 259: 8, 262: 1, 277: 1, **shape}
    offsets, counts = (273, 279) if strips else (324, 325)
    mark = b"II" if order == "<" else b"MM"
    head = mark + (struct.pack(order + "HHHQ", 43, 8, 0, 16) if big else struct.pack(order + "HL", 42, 8))
    lists = len(head) + struct.calcsize(f"={number}") + (len(tags) + 2) * struct.calcsize(f"=HH{word}{word}") + 8
    where = lists + 2 * pieces * struct.calcsize(f"={word}")
    tags |= {offsets: where, counts: len(data)} if pieces == 1 else {offsets: lists, counts: (lists + where) // 2}
    out = head + struct.pack(order + number, len(tags))
    kind = 16 if big else 4
    for tag, value in sorted(tags.items()):
        out += struct.pack(f"{order}HH{word}{word}", tag, kind, pieces if tag in (offsets, counts) else 1, value)
    out = out.ljust(lists, bytes(1))
    return out + struct.pack(f"{order}{2 * pieces}{word}", *[where] * pieces, *[len(data)] * pieces) + data


@pytest.mark.parametrize("form", ["<", ">", "<B"])
def test_a_tiff_in_tiles_or_strips_is_taken(form: str) -> None:
    grey = photo(48, 32)[..., 0]
    for strips, piece in ((False, (16, 32)), (False, (64, 32)), (True, (48, 16)), (True, (48, 32))):
        rows = np.zeros((piece[1], piece[0]), np.uint8)
        part = grey[: piece[1], : piece[0]]
        rows[: part.shape[0], : part.shape[1]] = part
        image = open_image(tiff((48, 32), piece, zlib.compress(rows.tobytes()), form, strips))
        assert np.array_equal(np.asarray(image)[: piece[1], : piece[0]], part)


def test_tiffs_as_pillow_and_others_write_them_are_taken() -> None:
    for mode in ("RGB", "L", "1", "I;16", "CMYK", "P"):
        for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"):
            for more in ({}, {"tiffinfo": {278: 1}}, {"big_tiff": True}):
                pixels = Image.fromarray(photo(48, 300)[..., 0]).convert(mode)
                assert open_image(encode(pixels, "TIFF", compression=compression, **more)).size == (48, 300)


@pytest.mark.parametrize("way", WAYS)
def test_tiles_that_are_larger_than_their_picture_are_refused_before_it_is_opened(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    few, many = zlib.compress(bytes(100)), zlib.compress(random.Random(0).randbytes(20_000))
    bombs = [tiff((16, 16), (8208, 8208), few, form) for form in ("<", ">", "<B")]
    bombs += [tiff((640, 16), (16, 1 << 22), few), tiff((1000, 300), (1, 1), few)]  # each costs something, too
    bombs += [tiff((16, 60_000), (16, 1), many, strips=True)]
    bombs += [struct.pack("<2sHLHHHLLHHLLHHLL", b"II", 42, 8, 3, 256, 4, 1, 16, 257, 4, 1, 16, 273, 4, 10**6, 99)]
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    for bomb in bombs:
        with pytest.raises(BadImage, match=r"pieces of .* is refused as a decompression bomb"):
            WAYS[way](bomb)


def rle(width: int, height: int, runs: bytes) -> bytes:
    """A run-length BMP."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    size = 14 + len(header) + 1024
    return b"BM" + struct.pack("<IHHI", size + len(runs), 0, 0, size) + header + bytes(range(256)) * 4 + runs


def test_what_pillow_decodes_byte_by_byte_is_no_bomb_unless_it_is_large() -> None:
    line = b"".join(b"\x01" + bytes([n % 256]) for n in range(300)) + bytes(2)
    twelve = (np.arange(200 * 300, dtype=">u2") % 4096).tobytes()
    for data in (rle(300, 200, line * 200 + b"\0\1"), b"P5 300 200 4095\n" + twelve, b"P6 100 200 4095\n" + twelve):
        assert EvalTransform(32, 32)(data).std() > 5
    for large in (rle(65_500, 1000, b"\1\1\0\0" * 1000 + b"\0\1"), b"P5 1500 1500 100\n", b"P3 900 900 255\n"):
        with pytest.raises(BadImage, match="refused as a decompression bomb in this form of"):
            open_image(large)
    plain = b"P2 300 200 255\n" + b"7 " * 30_000 + b"#\n%s" + b"7 " * 30_000
    assert EvalTransform(32, 32)(plain % b"").std() == 0
    with pytest.raises(BadImage, match="more than the 1,000 comments"):
        open_image(plain % (b"#\n" * 1000))
