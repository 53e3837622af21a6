"""RandAugment's sets are timm's and CRATE-α's, to the pixel, given the same draws."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from PIL import Image

from crate_dist.config import AugmentSection, ImageSection, RecipeError, load_recipe
from crate_dist.data.augment import augmentations
from crate_dist.data.randaugment import TimmRandAugment, normal, timm_operations
from crate_dist.data.tf_randaugment import OPERATIONS, TFRandAugment
from crate_dist.data.transforms import sample_rng
from tests.data.test_augment import digest, picture

FILL = 124, 116, 104
BICUBIC = Image.Resampling.BICUBIC

# CRC-32 of what timm 1.0.31 makes of picture() at magnitudes 4, 9.37 and 10, where signed of either sign: its
# increasing set, and those of the other one that differ.
TIMM_INCREASING = {
    "AutoContrast": "4cd328e0 4cd328e0 4cd328e0",
    "Equalize": "b509b6f8 b509b6f8 b509b6f8",
    "Invert": "d56e978e d56e978e d56e978e",
    "Rotate": "ae52f27f 69482512 f07e26e8 48290ae5 2f947775 a430cb25",
    "Posterize": "a2bdfa57 1340676c 0fe6c9a5",
    "Solarize": "31c2ef77 d56e978e d56e978e",
    "SolarizeAdd": "b322594a 9c30b479 b0abf073",
    "Color": "6a5df979 47f3bbe3 a49a11d3 af0c18dc 74a84a25 9e7184d7",
    "Contrast": "0f7946b0 503f4559 509f2a53 74a27d67 4e995a55 bd6b5a04",
    "Brightness": "af299091 06f88818 3edc54fe f91e7bb2 04d95ee1 b1a74281",
    "Sharpness": "168fd96d 6516ac58 ee3ef1eb b6058dd2 8e5a36a6 7b91cb6e",
    "ShearX": "628ab311 4230368b 2d27149d 11473047 c6a5ea57 ae231285",
    "ShearY": "24bf050b 56736942 5d1c5dda 1e4b33e4 58e00400 55d0b767",
    "TranslateX": "c2687593 7e4556a2 3295d5eb f02906e9 b87cc5e4 2395df59",
    "TranslateY": "9b7f104d 6444b7cf 024ed56f 328f356e a6110a3e efc74f06",
}
TIMM = TIMM_INCREASING | {
    "Posterize": "1340676c a2bdfa57 13a13503",
    "Solarize": "e801b69d a8deca1d a8deca1d",
    "Color": "4e922034 fdbee32c 74a84a25",
    "Contrast": "882829d3 6880db28 4e995a55",
    "Brightness": "56c22966 698adf73 04d95ee1",
    "Sharpness": "10b8cfa5 f7d85cac 8e5a36a6",
}
# Of its rand-m9-mstd0.5-inc1 and -inc0 with each random number taken from sample_rng(0, 0, n).
TIMM_CHAINS = {
    True: "d9d6cda0 a8deca1d a8deca1d 55ada8f3 a8deca1d b509b6f8 7456d1a7 7f71ebd6 d56e978e 5b48ecff a8deca1d bc1f71fb",
    False: "d9d6cda0 a8deca1d a8deca1d 55ada8f3 a8deca1d b509b6f8 "
    "7456d1a7 def4a60e a8deca1d 5ba0bb22 a8deca1d e8350b9c",
}
# Of what CRATE-α's code makes of it with TensorFlow 2.15, at magnitudes 4, 9.37 and 10.4.
CRATE_ALPHA = {
    "AutoContrast": "4cd328e0 4cd328e0 4cd328e0",
    "Equalize": "b509b6f8 b509b6f8 b509b6f8",
    "Invert": "d56e978e d56e978e d56e978e",
    "Rotate": "1224e349 e3824cff 66897ea8 23545cf1 ebe043b7 4dad25b0",
    "Posterize": "a2bdfa57 1340676c 1340676c",
    "Solarize": "31c2ef77 d56e978e d56e978e",
    "SolarizeAdd": "b322594a 9c30b479 9e69c4ca",
    "Color": "309bbefa ffa42a32 49c17c0c 8d8d4ee1 75a98e4b 7bee6410",
    "Contrast": "df4afb16 aa1e53a3 c41199d1 4d4d80e7 b2d50fab 3d837167",
    "Brightness": "af299091 06f88818 3edc54fe f91e7bb2 4534e3aa b1a74281",
    "Sharpness": "2dc539c2 26917074 861b8956 bbdb0dec 6872af49 0d77a7d4",
    "ShearX": "65ef01c9 85056cd8 14ca2965 9b53a1f0 d92c488a 6de71c08",
    "ShearY": "a6058ac2 b3df8646 506eedc7 82027fbf 07f7c877 dda36a0d",
    "TranslateX": "eb61172b 5dfa381c 102686e9 102686e9 102686e9 102686e9",
    "TranslateY": "102686e9 102686e9 102686e9 102686e9 102686e9 102686e9",
}


@pytest.mark.parametrize(("increasing", "expected"), [(True, TIMM_INCREASING), (False, TIMM)])
def test_timms_operations_make_its_pixels(increasing: bool, expected: dict[str, str]) -> None:
    found = {}
    for operation in timm_operations(increasing):
        signs = (1, -1) if operation.signed else (1,)
        strengths = [sign * operation.strength(magnitude) for magnitude, sign in product((4, 9.37, 10), signs)]
        images = [operation.apply(Image.fromarray(picture()), strength, FILL, BICUBIC) for strength in strengths]
        found[operation.name] = " ".join(map(digest, images))
    assert list(found) == list(TIMM_INCREASING)
    assert found == expected


@pytest.mark.parametrize("increasing", [True, False])
def test_what_is_drawn_is_applied_as_timm_does(increasing: bool) -> None:
    found = []
    for number in range(12):
        pixels = picture()
        TimmRandAugment(2, 9, 0.5, increasing, FILL)(pixels, sample_rng(0, 0, number))
        found.append(digest(pixels))
    assert found == TIMM_CHAINS[increasing].split()


def test_crate_alphas_operations_make_its_pixels() -> None:
    found = {}
    for operation in OPERATIONS:
        signs = (1, -1) if operation.signed else (1,)
        levels = product((4, 9.37, 10.4), signs)
        strengths = [sign * operation.strength(np.float32(magnitude)) for magnitude, sign in levels]
        found[operation.name] = " ".join(digest(operation.apply(picture(), by, FILL)) for by in strengths)
    assert found == CRATE_ALPHA


def test_half_of_the_operations_are_left_out_as_published() -> None:
    for augment in (TimmRandAugment(1, 9, 0.5, True, FILL), TFRandAugment(1, 9, 0.5, FILL)):
        untouched = 0
        for number in range(400):
            augment(pixels := picture(), sample_rng(5, 0, number))
            untouched += np.array_equal(pixels, picture())
        assert 170 < untouched < 250


def test_the_noise_on_the_magnitude_is_normal() -> None:
    rng = sample_rng(0, 0, 0)
    drawn = np.array([normal(rng) for _ in range(20_000)])
    assert abs(drawn.mean()) < 0.02
    assert abs(drawn.std() - 1) < 0.02
    assert abs((drawn > 1.6449).mean() - 0.05) < 0.006


def test_a_recipe_names_the_set_with_the_data_s_mean_and_filter() -> None:
    images = ImageSection(resize_filter="bilinear")
    section = AugmentSection(randaugment="timm_increasing", randaugment_ops=2, randaugment_magnitude=9)
    assert augmentations(section, images) == (TimmRandAugment(2, 9, 0.0, True, FILL, "bilinear"),)
    section = section.model_copy(update={"randaugment": "crate_alpha", "randaugment_std": 0.5})
    assert augmentations(section, images) == (TFRandAugment(2, 9, 0.5, FILL),)


def test_strengths_that_a_set_does_not_have_are_refused_with_what_would_do() -> None:
    with pytest.raises(RecipeError, match=r"randaugment_magnitude 14: 'timm' has magnitudes up to 10; 9 is what"):
        load_recipe("crate_tiny", ["augment.randaugment=timm"])
    with pytest.raises(RecipeError, match=r"torchvision's RandAugment has no noise; randaugment = \"timm\""):
        load_recipe("crate_tiny", ["augment.randaugment_std=0.5"])
