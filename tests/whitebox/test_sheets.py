"""Sheets of pictures: everything that was given is on them, whatever it is, and attention has a scale that tells."""

from __future__ import annotations

import numpy as np
import pytest

from crate_dist.data.decode import Pixels
from crate_dist.whitebox.pixels import heat
from crate_dist.whitebox.sheets import Captioned, attention, captioned


def plain(colour: tuple[int, int, int], side: int = 8) -> Pixels:
    return np.full((side, side, 3), colour, dtype=np.uint8)


def count(sheet: Pixels, colour: tuple[int, int, int] | np.ndarray) -> int:
    return int((sheet == colour).all(axis=2).sum())


def maps(values: float, spread: float, columns: int = 2, images: int = 3) -> np.ndarray:
    noise = np.random.default_rng(0).random((columns, images, 4, 4))
    return values + spread * (noise - noise.min()) / (noise.max() - noise.min())


@pytest.mark.parametrize("side", [8, 300])
def test_every_picture_is_shown_whole_and_a_long_or_foreign_name_is_cut_to_fit(side: int) -> None:
    colours = [(10, 20, 200 + number) for number in range(7)]
    lines = ("a name much longer than the picture is wide, by far", "crème brûlée")
    sheet = captioned([Captioned(plain(colour, side), lines) for colour in colours], "title", columns=3, side=96)
    assert [count(sheet, colour) for colour in colours] == 7 * [96 * 96]
    assert 3 * 96 < sheet.shape[1] < 4 * 96
    assert 3 * 96 < sheet.shape[0] < 4 * 96 + 60


@pytest.mark.parametrize("spread", [1e-4, 0.02, 3.0, 60.0])
def test_the_colours_of_a_column_reach_from_its_least_to_its_most(spread: float) -> None:
    images = [plain((1, 2, 3)) for _ in range(3)]
    sheet = attention(images, maps(1 - spread / 100, spread), ("layer 1", "layer 2"), "title")
    least, most = heat(np.array([[0.0, 1.0]]))[0]
    assert count(sheet, least) >= (72 // 4) ** 2
    assert count(sheet, most) >= (72 // 4) ** 2
    assert count(sheet, (1, 2, 3)) == 3 * 72 * 72


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan"), float("inf")])
def test_attention_that_is_even_or_no_number_is_drawn_too(value: float) -> None:
    values = maps(1.0, 0.5)
    values[1] = value
    sheet = attention([plain((1, 2, 3))] * 3, values, ("layer 1", "layer 2"), "title")
    assert sheet.dtype == np.uint8
    assert count(sheet, (0, 0, 4)) >= 3 * 72 * 72  # the least, all over
