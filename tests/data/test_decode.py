"""The fast decoder shows what Pillow shows, no more than a crop of it, and leaves to Pillow what it does not take."""

from __future__ import annotations

import io
import random
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from crate_dist.config import ResizeFilter
from crate_dist.data import decode
from crate_dist.data.decode import BadImage, Box, Pixels, decode_crop, jpeg_size, open_image, resized_exactly
from crate_dist.data.transforms import EvalTransform, TrainTransform, random_crop, sample_rng
from tests.pictures import encode, photo, psnr_db

KINDS: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "optimized": {"optimize": True},
    "restart markers": {"restart_marker_blocks": 3},
    "coarse": {"quality": 10},
}


def reference(data: bytes, box: Box) -> Pixels:
    """The crop as Pillow decodes it."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").crop(box))


def photographs() -> list[Pixels]:
    return [*load_sample_images().images, *(photo(500, 375, seed) for seed in range(4)), photo(333, 500, 9)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_crop_is_the_same_to_the_bit_as_pillows(kind: str) -> None:
    data = encode(photo(201, 147), **{"quality": 90, **KINDS[kind]})
    assert jpeg_size(data) == (201, 147)
    rng = random.Random(0)
    for _ in range(60):
        box = random_crop(201, 147, (0.01, 1.0), (0.3, 3.0), rng)
        crop = decode_crop(data, (201, 147), box)
        assert crop is not None
        assert np.array_equal(crop, reference(data, box))


def test_a_greyscale_jpeg_becomes_rgb() -> None:
    data = encode(Image.fromarray(photo(90, 70)).convert("L"))
    crop = decode_crop(data, (90, 70), (10, 5, 60, 40))
    assert crop is not None
    assert np.array_equal(crop, reference(data, (10, 5, 60, 40)))


def test_rows_below_the_crop_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data, heights, decoded = encode(photo(160, 160)), [], decode.simplejpeg.decode_jpeg

    def spy(*arguments: Any, **options: Any) -> Pixels:
        pixels: Pixels = decoded(*arguments, **options)
        heights.append(pixels.shape[0])
        return pixels

    monkeypatch.setattr(decode.simplejpeg, "decode_jpeg", spy)
    decode_crop(data, (160, 160), (0, 0, 160, 50))
    decode_crop(data, (160, 160), (0, 110, 160, 160))
    assert heights == [54, 160]


@pytest.mark.parametrize("resize_filter", ["bicubic", "bilinear"])
def test_training_crops_agree_with_pillows(resize_filter: ResizeFilter) -> None:
    """At least 40 dB is the promise; the same weights rounded in another place give more."""
    transform, values = TrainTransform(224, flip=0.0, resize_filter=resize_filter), []
    for pixels in photographs():
        data, size = encode(pixels, quality=92), (pixels.shape[1], pixels.shape[0])
        for number in range(8):
            box = random_crop(*size, transform.scale, transform.ratio, random.Random(number))
            exact = resized_exactly(open_image(data), box, (224, 224), resize_filter)
            values.append(psnr_db(transform(data, random.Random(number)), exact))
    assert statistics.median(values) > 50
    assert min(values) > 40


@pytest.mark.parametrize(("side", "shrink"), [(80, 2), (40, 4), (20, 8)])
def test_a_large_crop_is_shrunk_while_it_is_decoded(side: int, shrink: int) -> None:
    transform, values = TrainTransform(side, scale=(0.8, 1.0), flip=0.0), []
    for number in range(20):
        data = encode(photo(450, 350, number), quality=92)
        box, drawn, _ = transform.draw((450, 350), random.Random(number))
        exact = resized_exactly(open_image(data), box, (side, side))
        assert drawn == shrink
        values.append(psnr_db(transform(data, random.Random(number)), exact))
    assert statistics.median(values) > 40


@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_a_shrunk_crop_is_where_it_was_asked_for(shrink: int) -> None:
    data, box = encode(photo(331, 205), quality=95), (16, 40, 240, 120)
    crop = decode_crop(data, (331, 205), box, shrink)
    assert crop is not None
    assert crop.shape == (80 // shrink, 224 // shrink, 3)
    assert psnr_db(crop, np.asarray(Image.fromarray(reference(data, box)).reduce(shrink))) > 32


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_a_truncated_jpeg_is_never_half_a_picture(options: dict[str, Any]) -> None:
    data = encode(photo(120, 90), quality=85, **options)
    for share in np.linspace(0.02, 0.97, 30):
        cut = data[: int(len(data) * share)]
        for transform in (TrainTransform(32, scale=(0.05, 0.1)), TrainTransform(32, scale=(1.0, 1.0))):
            for number in range(4):  # also crops that lie above the end
                with pytest.raises(BadImage):
                    transform(cut, sample_rng(0, 0, number))
        with pytest.raises(BadImage):
            EvalTransform(32, 32)(cut)


def test_a_jpeg_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(photo(64, 64))
    frame = data.index(b"\xff\xc0")
    bomb = data[: frame + 5] + (20_000).to_bytes(2, "big") * 2 + data[frame + 9 :]
    monkeypatch.setattr(decode.simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("decoded"))
    for transform in (lambda: TrainTransform(32)(bomb, random.Random(0)), lambda: EvalTransform(32, 32)(bomb)):
        with pytest.raises(BadImage, match="bomb"):
            transform()


def test_four_colours_are_left_to_pillow() -> None:
    data = encode(Image.fromarray(photo(80, 60)).convert("CMYK"))
    assert jpeg_size(data) is None
    assert TrainTransform(32)(data, random.Random(0)).std() > 5


@pytest.mark.parametrize("dtype", [np.uint16, np.int32], ids=["I;16", "I"])
def test_sixteen_bits_are_scaled_and_not_clipped(dtype: type) -> None:
    grey = photo(64, 48)[..., 0]
    data = encode(Image.fromarray((grey.astype(np.uint16) * 257).astype(dtype)), "TIFF")
    eight = encode(Image.fromarray(grey), "PNG")
    for transform in (TrainTransform(32), lambda data, _: EvalTransform(32, 32)(data)):
        assert np.array_equal(transform(data, random.Random(3)), transform(eight, random.Random(3)))


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 3)])
def test_tiny_pictures_are_pictures(form: str, size: tuple[int, int]) -> None:
    data = encode(Image.new("RGB", size, (200, 100, 50)), form)
    for pixels in (TrainTransform(16)(data, random.Random(0)), EvalTransform(16, 16)(data)):
        assert pixels.shape == (16, 16, 3)
        assert np.abs(pixels.astype(int) - (200, 100, 50)).max() < 8


def test_postscript_is_not_run() -> None:
    with pytest.raises(BadImage, match="not an image"):
        TrainTransform(16)(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", random.Random(0))


def test_what_the_fast_decoder_warns_of_is_pillows_to_judge() -> None:
    """A scan that is damaged but goes on to its end: Pillow takes it, so does training, and sees the same."""
    data = bytearray(encode(photo(200, 150), quality=90, restart_marker_rows=1))
    data[len(data) // 2 : len(data) // 2 + 40] = b"\x55" * 40
    for number in range(6):
        box = random_crop(200, 150, (0.3, 1.0), (0.7, 1.4), random.Random(number))
        pixels = TrainTransform(64, scale=(0.3, 1.0), ratio=(0.7, 1.4), flip=0.0)(bytes(data), random.Random(number))
        assert psnr_db(pixels, resized_exactly(open_image(bytes(data)), box, (64, 64))) > 40


def test_a_decode_that_fails_without_a_word_is_noticed() -> None:
    """simplejpeg keeps silent on a fatal error that follows a warning; the memory must not pass for a picture."""
    data = encode(photo(64, 48))
    scan = data.index(b"\xff\xda")
    table = data[: scan + 6] + b"\x77" + data[scan + 7 :]  # a Huffman table that does not exist
    broken = table[: scan + 11] + b"\x01" + table[scan + 12 :]  # and before it, a spectrum that is not sequential
    assert decode.simplejpeg.decode_jpeg(broken, strict=False).shape == (48, 64, 3)
    assert decode_crop(broken, (64, 48), (0, 0, 64, 20)) is None
    with pytest.raises(BadImage):
        TrainTransform(16)(broken, random.Random(0))


FORMS: list[tuple[str, dict[str, Any]]] = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("JPEG", {"restart_marker_blocks": 2}),
    *((form, {}) for form in ("PNG", "GIF", "WEBP", "BMP", "TIFF")),
]
ORIGINALS = [encode(photo(48, 40, seed), form, **options) for seed, (form, options) in enumerate(FORMS)]


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from(ORIGINALS), st.integers(0, 2**32))
def test_damaged_files_give_a_picture_or_an_error_and_always_the_same(original: bytes, seed: int) -> None:
    rng = random.Random(seed)
    data = bytearray(original)
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[place] = rng.randrange(256)
            case 1:
                del data[place : place + rng.randint(1, 30)]
            case 2:
                data[place:place] = rng.randbytes(rng.randint(1, 30))
            case 3:
                data[place : place + 1] = data[:place][-rng.randint(1, 60) :]
        data = data or bytearray(b"\0")

    def outcome() -> bytes | str:
        try:
            pixels = TrainTransform(16)(bytes(data), random.Random(seed))
        except BadImage as error:
            return str(error)
        assert pixels.shape == (16, 16, 3)
        return pixels.tobytes()

    assert outcome() == outcome()
