"""RandAugment and random erasing are torchvision's, and nothing but the sample's generator decides them."""

from __future__ import annotations

import itertools
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from crate_dist.config import AugmentSection, ImageSection
from crate_dist.data.augment import ColorJitter, NoiseErasing, RandomErasing, augmentations
from crate_dist.data.decode import Pixels
from crate_dist.data.index import ShardIndex
from crate_dist.data.loader import Share, TrainLoader, train_transform
from crate_dist.data.order import Order
from crate_dist.data.randaugment import RandAugment, operations
from crate_dist.data.transforms import EvalTransform, TrainTransform, sample_rng
from tests.conftest import png

WIDTH, HEIGHT = 56, 40
IMAGES = ImageSection()

# CRC-32 of what torchvision 0.28 makes of picture() with Pillow: at magnitudes 14 and 30, where signed of either sign.
TORCHVISION = {
    "Identity": "a8deca1d a8deca1d",
    "ShearX": "13941a8d 2fd86ba9 0ee54a0f 7e78df75",
    "ShearY": "f71b5193 9f900539 295bec47 d9d60f35",
    "TranslateX": "bfd8174e d7a12ecc c369e178 6876f9ab",
    "TranslateY": "edaf9352 305e04fc afde69a6 61dfb40f",
    "Rotate": "34394031 2109bbb3 d422bf60 7816ba14",
    "Brightness": "6f271b9d d301dea4 04d95ee1 b1a74281",
    "Color": "8e230f08 4d1b9b79 74a84a25 9e7184d7",
    "Contrast": "25c14e67 bae4cf98 4e995a55 bd6b5a04",
    "Sharpness": "a0ad545a 62fa8458 8e5a36a6 7b91cb6e",
    "Posterize": "139c851c 13a13503",
    "Solarize": "705d7f7d d56e978e",
    "AutoContrast": "4cd328e0 4cd328e0",
    "Equalize": "b509b6f8 b509b6f8",
}
# Of its RandAugment(2, 14) with each random number taken from sample_rng(0, 0, n), and the rectangles that its
# RandomErasing(0.75) fills with those of sample_rng(1, 0, n): top, left, bottom, right.
TORCHVISION_CHAINS = (
    "b509b6f8 2a1a25ad 25e2df38 09656fc2 f07f05d2 a8deca1d 49dc20d6 be1a8ab8 5f307c63 b8667450 c1f69a53 98ee9353"
)
TORCHVISION_BOXES = [
    (12, 4, 34, 33),
    (21, 14, 30, 30),
    (2, 37, 15, 52),
    (23, 27, 32, 35),
    (3, 14, 8, 25),
    (0, 6, 12, 33),
    (11, 4, 27, 27),
    None,
    (29, 20, 38, 39),
    (0, 15, 28, 32),
    (7, 27, 30, 48),
    (4, 19, 17, 51),
]

# Rectangles that timm's RandomErasing(0.75, mode="pixel") fills with the same numbers.
TIMM_BOXES = [
    (12, 4, 34, 34),
    (21, 14, 30, 30),
    (2, 37, 15, 52),
    (23, 27, 32, 35),
    (3, 14, 8, 25),
    (0, 6, 12, 33),
    (11, 4, 27, 27),
    None,
    (29, 20, 38, 39),
    (0, 15, 28, 32),
    (6, 27, 30, 48),
    (4, 19, 17, 51),
]


def picture() -> Pixels:
    """Uneven in every direction and colour, with room above and below its range of values."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    planes = ((7 * x + 3 * y) % 256, (x * y) % 256, (255 - 5 * y + (x // 8) * 16) % 256)
    return np.stack(planes, axis=-1).astype(np.uint8) // 2 + 40


def digest(pixels: Pixels | Image.Image) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(pixels).tobytes()):08x}"


def erased_box(pixels: Pixels) -> tuple[int, ...] | None:
    places = np.argwhere((pixels == (1, 2, 3)).all(axis=-1))
    return (*map(int, places.min(axis=0)), *(int(n) + 1 for n in places.max(axis=0))) if len(places) else None


@pytest.mark.parametrize("name", TORCHVISION)
def test_every_operation_makes_torchvision_s_pixels(name: str) -> None:
    operation = next(op for op in operations(WIDTH, HEIGHT) if op.name == name)
    image = Image.fromarray(picture())
    strengths = [sign * operation.strengths[n] for n in (14, 30) for sign in ((1, -1) if operation.signed else (1,))]
    assert [digest(operation.apply(image, strength)) for strength in strengths] == TORCHVISION[name].split()


def test_the_operations_are_torchvision_s_in_its_order() -> None:
    assert [operation.name for operation in operations(224, 224)] == list(TORCHVISION)
    for operation in operations(224, 224):
        assert len(operation.strengths) == 31


def test_what_is_drawn_is_applied_as_torchvision_does() -> None:
    found = []
    for number in range(12):
        pixels = picture()
        RandAugment(2, 14)(pixels, sample_rng(0, 0, number))
        found.append(digest(pixels))
    assert found == TORCHVISION_CHAINS.split()


def test_rectangles_are_erased_where_torchvision_would() -> None:
    found = []
    for number in range(12):
        pixels = picture()
        RandomErasing(0.75, (1, 2, 3))(pixels, sample_rng(1, 0, number))
        found.append(erased_box(pixels))
    assert found == TORCHVISION_BOXES


def test_rectangles_have_the_share_the_areas_and_the_colour_that_were_asked_for() -> None:
    areas = []
    for number in range(2000):
        pixels = np.zeros((64, 64, 3), dtype=np.uint8)
        RandomErasing(0.25, (1, 2, 3))(pixels, sample_rng(7, 0, number))
        if box := erased_box(pixels):
            top, left, bottom, right = box
            areas.append((bottom - top) * (right - left) / 64**2)
            assert (pixels != 0).any(axis=-1).sum() == (bottom - top) * (right - left)
    assert 430 < len(areas) < 570
    assert 0.015 < min(areas) < max(areas) < 0.35
    (mean_colour,) = augmentations(AugmentSection(erase=0.25), IMAGES)
    assert mean_colour == RandomErasing(0.25, (124, 116, 104))


def test_noise_is_in_timms_rectangles_and_normal_after_normalisation() -> None:
    erase, plain = NoiseErasing(0.75, IMAGES.mean, IMAGES.std), picture()
    found: list[tuple[int, ...] | None] = []
    noise = []
    for number in range(12):
        erase(pixels := picture(), sample_rng(1, 0, number))
        places = np.argwhere((pixels != plain).any(axis=-1))
        found.append(
            (*map(int, places.min(axis=0)), *(int(n) + 1 for n in places.max(axis=0))) if len(places) else None
        )
        if box := found[-1]:
            top, left, bottom, right = box
            noise.append(pixels[top:bottom, left:right].reshape(-1, 3))
    assert found == TIMM_BOXES
    normalised = (np.concatenate(noise) / 255 - IMAGES.mean) / IMAGES.std
    assert np.abs(normalised.mean(axis=0)).max() < 0.05
    assert np.abs(normalised.std(axis=0) - 0.97).max() < 0.03
    assert np.abs(np.corrcoef(normalised.T) - np.eye(3)).max() < 0.05
    assert augmentations(AugmentSection(erase=0.75, erase_mode="pixel"), IMAGES) == (erase,)


def test_jitter_changes_brightness_contrast_and_saturation_in_every_order() -> None:
    """Each picture is one of six that the factors drawn for it can make, and all six orders occur."""
    kinds, seen = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), set()
    for number in range(60):
        ColorJitter(0.4)(pixels := picture(), sample_rng(0, 0, number))
        rng = sample_rng(0, 0, number)
        factors = [0.6 + 0.8 * rng.random() for _ in kinds]
        made = {}
        for order in itertools.permutations(range(3)):
            image = Image.fromarray(picture())
            for place in order:
                image = kinds[place](image).enhance(factors[place])
            made[order] = digest(image)
        orders = [order for order, made_so in made.items() if made_so == digest(pixels)]
        assert orders
        seen |= set(orders) if len(orders) == 1 else set()
    assert len(seen) == 6
    assert augmentations(AugmentSection(color_jitter=0.4), IMAGES) == (ColorJitter(0.4),)


class Draws(random.Random):
    """Says that something other than random() was asked for."""

    def getrandbits(self, k: int, /) -> int:
        raise AssertionError("only random() is stable over versions of Python")


def test_only_random_is_drawn() -> None:
    plain = AugmentSection(randaugment_ops=2, erase=0.5)
    timm = AugmentSection(
        randaugment="timm_increasing",
        randaugment_ops=2,
        randaugment_magnitude=9,
        randaugment_std=0.5,
        color_jitter=0.4,
        erase=0.5,
        erase_mode="pixel",
    )
    for section in (plain, timm, timm.model_copy(update={"randaugment": "crate_alpha"})):
        transform = TrainTransform(32, augment=augmentations(section, IMAGES))
        for number in range(30):
            transform(png(picture()), Draws(number))


def test_they_come_behind_crop_and_flip_and_leave_these_as_they_are() -> None:
    seen: list[Pixels] = []
    data = png(picture())
    with_both = augmentations(AugmentSection(randaugment_ops=1, erase=1.0), IMAGES)
    for number in range(20):
        plain = TrainTransform(32)(data, sample_rng(0, 0, number))
        changed = TrainTransform(32, augment=(lambda pixels, _: seen.append(pixels.copy()), *with_both))(
            data, sample_rng(0, 0, number)
        )
        assert np.array_equal(seen[-1], plain)
        assert not np.array_equal(changed, plain)
    assert augmentations(AugmentSection(), IMAGES) == ()


def test_augmented_pixels_are_the_same_at_any_number_of_workers_and_after_a_resume(cast_shards: Path) -> None:
    index = ShardIndex.load(cast_shards / "train")

    def take(workers: int, step: int, count: int) -> list[torch.Tensor]:
        transform = train_transform(AugmentSection(randaugment_ops=2, erase=0.5), ImageSection(), 24)
        order = Order(index.shard_sizes, seed=3, lanes=4, window=16)
        batches = TrainLoader(index, order, Share(0, 1, 20, 10), transform, workers, step)
        return [batch.images.clone() for batch in itertools.islice(batches, count)]

    whole = take(workers=0, step=0, count=12)
    assert all(torch.equal(a, b) for a, b in zip(whole, take(workers=2, step=0, count=12), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole[8:], take(workers=1, step=4, count=4), strict=True))


def test_stretched_evaluation_sees_the_whole_picture_as_a_square() -> None:
    pixels = EvalTransform(32, None)(png(picture()))
    expected = Image.fromarray(picture()).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels, np.asarray(expected))
