"""A measure of all layers over the steps: a colour for each layer, whatever the numbers are."""

from __future__ import annotations

import numpy as np
import pytest

from crate_dist.whitebox.over_time import colour_of, layers_over_time


def test_every_layer_has_a_colour_of_its_own() -> None:
    layers = 12
    colours = {colour_of(layer, layers) for layer in range(layers)}
    assert len(colours) == layers
    flat = np.tile(np.arange(layers, dtype=float), (50, 1))  # lines that cross nowhere
    panel = layers_over_time("one", range(50), 1e-6 * flat)[:, :400].astype(int)  # without the legend
    assert max(np.abs(panel - colour).max(axis=2).min() for colour in colours) <= 3, "some colour is not there"


@pytest.mark.parametrize("value", [0.0, 3.0, np.nan, np.inf, -1e30])
def test_one_measurement_and_numbers_that_are_none_are_drawn_too(value: float) -> None:
    for steps in ([1], [1, 500, 1000]):
        values = np.zeros((len(steps), 2))
        values[-1] = value
        assert layers_over_time("one", steps, values).std() > 0


def test_of_a_long_run_the_newest_point_is_shown() -> None:
    steps, late = range(0, 500 * 2001, 500), np.zeros((2001, 1))
    late[-1] = 1.0
    assert not np.array_equal(layers_over_time("one", steps, late), layers_over_time("one", steps, 0 * late))
