"""Decode and augment: what is drawn, what is seen, what is refused."""

from __future__ import annotations

import io
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from crate_dist.config import ImageSection, ResizeFilter
from crate_dist.data.decode import BadImage
from crate_dist.data.loader import eval_transform
from crate_dist.data.order import hash64
from crate_dist.data.transforms import EvalTransform, TrainTransform, random_crop, sample_rng, tensorflow_crop
from tests.conftest import png

TENSORFLOW_AREAS = (0.114, 0.178, 0.319, 0.502, 0.643)


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def gradient(width: int, height: int) -> np.ndarray:
    """Red grows to the right, green downwards: a picture that tells where a crop was taken."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, np.full_like(x, 128)], axis=-1).astype(np.uint8)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**60))
def test_a_crop_lies_in_the_image(width: int, height: int, seed: int) -> None:
    left, top, right, bottom = random_crop(width, height, (0.08, 1.0), (3 / 4, 4 / 3), random.Random(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_crops_have_the_areas_and_aspects_that_were_asked_for() -> None:
    boxes = [random_crop(1000, 1000, (0.2, 0.6), (0.5, 2.0), sample_rng(0, 0, n)) for n in range(3000)]
    widths = np.array([right - left for left, _, right, _ in boxes])
    heights = np.array([bottom - top for _, top, _, bottom in boxes])
    areas, ratios = widths * heights / 1e6, widths / heights
    assert areas.min() > 0.195
    assert areas.max() < 0.605
    assert abs(areas.mean() - 0.4) < 0.01
    assert ratios.min() > 0.49
    assert ratios.max() < 2.02
    assert abs(np.log(ratios).mean()) < 0.03  # the logarithm is uniform
    assert abs(np.mean([left + w / 2 for (left, *_), w in zip(boxes, widths, strict=True)]) - 500) < 10


def test_pixels_depend_on_seed_epoch_and_sample_alone() -> None:
    transform, data = TrainTransform(32), png(gradient(80, 60))
    first = transform(data, sample_rng(1, 2, 3))
    assert np.array_equal(first, transform(data, sample_rng(1, 2, 3)))
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert not np.array_equal(first, transform(data, sample_rng(*other)))


@given(st.integers(0, 2**62), st.integers(0, 10**6), st.integers(0, 2**40))
def test_the_generator_of_a_sample_is_seeded_by_the_hash_of_the_order(seed: int, epoch: int, sample: int) -> None:
    expected = random.Random(int(hash64(seed, epoch, sample, 1)[0]))
    assert sample_rng(seed, epoch, sample).random() == expected.random()


def test_pixels_can_be_written_into_a_batch() -> None:
    data, batch = png(gradient(80, 60)), np.zeros((3, 32, 32, 3), dtype=np.uint8)
    TrainTransform(32)(data, sample_rng(0, 0, 5), batch[1])
    assert np.array_equal(batch[1], TrainTransform(32)(data, sample_rng(0, 0, 5)))
    EvalTransform(32, 32)(data, batch[2])
    assert np.array_equal(batch[2], EvalTransform(32, 32)(data))
    assert not batch[0].any()


def test_half_of_the_pictures_are_mirrored() -> None:
    transform, data = TrainTransform(16, scale=(1.0, 1.0), ratio=(1.0, 1.0)), png(gradient(64, 64))
    mirrored = [transform(data, sample_rng(0, 0, n))[0, 0, 0] > 128 for n in range(400)]
    assert 150 < sum(mirrored) < 250
    never = TrainTransform(16, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    assert not any(never(data, sample_rng(0, 0, n))[0, 0, 0] > 128 for n in range(50))


@pytest.mark.parametrize(("width", "height"), [(400, 300), (300, 400), (256, 256), (50, 90)])
def test_evaluation_sees_the_centre(width: int, height: int) -> None:
    pixels = EvalTransform(size=224, short_side=256)(png(gradient(width, height)))
    assert pixels.shape == (224, 224, 3)
    assert abs(pixels[..., 0].mean() - 127.5) < 2
    assert abs(pixels[..., 1].mean() - 127.5) < 2
    seen = 224 / 256 * min(width, height) / width  # the share of the width that is left
    assert np.ptp(pixels[..., 0].astype(int)) == pytest.approx(255 * seen, abs=4)


def torchvision_s(image: Image.Image, short_side: int, size: int, resize_filter: str) -> np.ndarray:
    """Resize(short_side) and CenterCrop(size), as torchvision computes them for images of Pillow."""
    long_side = int(short_side * max(image.size) / min(image.size))
    width, height = (long_side, short_side) if image.width > image.height else (short_side, long_side)
    image = image.resize((width, height), Image.Resampling[resize_filter.upper()])
    left, top = int(round((width - size) / 2.0)), int(round((height - size) / 2.0))  # noqa: RUF046
    return np.asarray(image.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("resize_filter", ["bicubic", "bilinear"])
def test_evaluation_sees_torchvision_s_pixels_at_every_size(resize_filter: ResizeFilter) -> None:
    rng = np.random.default_rng(1)
    noise, shifted = Image.fromarray(rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)), 0
    transform = eval_transform(ImageSection(resize_filter=resize_filter), 56)
    for width, height in [(64, 64), (56, 56), (64, 99), (500, 375), *rng.integers(20, 300, (250, 2)).tolist()]:
        image = noise.resize((width, height))
        data = encode(image, "PPM")
        assert np.array_equal(transform(data), torchvision_s(image, 64, 56, resize_filter)), (width, height)
        shifted += round(64 * max(width, height) / min(width, height)) != 64 * max(width, height) // min(width, height)
    assert shifted > 50  # what rounding to the nearest would have moved
    stretched = eval_transform(ImageSection(resize_filter=resize_filter, eval_fit="stretch"), 56)(data)
    assert np.array_equal(stretched, np.asarray(image.resize((56, 56), Image.Resampling[resize_filter.upper()])))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_kind_of_picture_becomes_rgb(mode: str) -> None:
    image = Image.fromarray(gradient(40, 40))
    image = Image.fromarray(gradient(40, 40)[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    data = encode(image, "JPEG" if mode == "CMYK" else "PNG")
    pixels = EvalTransform(32, 32)(data)
    assert pixels.shape == (32, 32, 3)
    assert pixels.std() > 10


def test_exif_rotation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(gradient(64, 64)), "JPEG", exif=exif, quality=95)
    pixels = EvalTransform(64, 64)(data)
    assert pixels[32, -1, 0] > 240  # red still grows to the right


def bomb() -> bytes:
    """A PNG of 20,000 x 20,000 pixels in a few hundred bytes."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100_000)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image"),
        (b"not a picture", "not an image"),
        (encode(Image.fromarray(gradient(200, 200)), "JPEG")[:2000], "does not decode"),
        (bomb(), "bomb"),
    ],
    ids=["empty", "text", "truncated", "bomb"],
)
def test_what_is_no_picture_is_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        TrainTransform(32)(data, sample_rng(0, 0, 0))


def test_tensorflows_crop_has_its_distribution_and_takes_all_of_an_image_that_no_crop_fits() -> None:
    """The quantiles of 150,000 draws of TensorFlow 2.15's sample_distorted_bounding_box at big_vision's bounds."""
    scale, ratio = (0.08, 1.0), (0.75, 1.33)
    draws = [tensorflow_crop(375, 500, scale, ratio, sample_rng(0, 0, n)) for n in range(5000)]
    left, top, right, bottom = np.array(draws).T
    areas = (right - left) * (bottom - top) / (375 * 500)
    assert np.allclose(np.quantile(areas, [0.1, 0.25, 0.5, 0.75, 0.9]), TENSORFLOW_AREAS, atol=0.015)
    assert (left.min(), top.min()) == (0, 0)
    assert (right.max(), bottom.max()) <= (375, 500)
    assert scale[0] <= areas.min() < areas.max() <= scale[1]
    ratios = (right - left) / (bottom - top)
    assert 0.74 < ratios.min() < ratios.max() < 1.34
    assert abs(ratios.mean() - 1.04) < 0.01
    assert tensorflow_crop(1000, 10, (0.5, 1.0), ratio, sample_rng(0, 0, 0)) == (0, 0, 1000, 10)
    assert TrainTransform(512, scale, ratio, crop="tensorflow").draw((375, 500), sample_rng(0, 0, 0))[0] == draws[0]
