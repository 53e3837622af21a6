"""Positions of one grid of patches serve on another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from crate_dist.config import ModelSection
from crate_dist.models.adapt import adapt
from crate_dist.models.build import initialise, model_config
from crate_dist.models.positions import interpolate_positions


def plane(rows: int, columns: int) -> torch.Tensor:
    """Positions that say where their patch's centre lies, in shares of the picture, behind a class token of 7s."""
    y, x = (torch.arange(count).add(0.5) / count for count in (rows, columns))
    patches = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).reshape(1, -1, 2)
    return torch.cat((torch.full((1, 1, 2), 7.0), patches), dim=1)


def test_on_their_own_grid_positions_are_the_same_tensor() -> None:
    positions = torch.randn(1, 17, 6)
    assert interpolate_positions(positions, (4, 4)) is positions


@pytest.mark.parametrize("grid", [(28, 28), (7, 7), (9, 21), (3, 2)])
def test_a_patch_gets_the_position_of_its_place_in_the_picture(grid: tuple[int, int]) -> None:
    moved = interpolate_positions(plane(14, 14), grid)
    expected = plane(*grid)
    assert moved.shape == expected.shape
    assert torch.equal(moved[:, 0], torch.full((1, 2), 7.0))  # the class token has no place
    assert (moved - expected).abs().max() < 0.03  # bicubic is exact on a plane but at its edges
    assert torch.equal(interpolate_positions(plane(14, 14)[:, 1:], grid), moved[:, 1:])  # without a class token


def test_half_precision_stays_so_and_gradients_flow() -> None:
    positions = torch.randn(1, 17, 3, dtype=torch.bfloat16, requires_grad=True)
    moved = interpolate_positions(positions, (6, 5))
    assert moved.dtype == torch.bfloat16
    moved.float().sum().backward()
    assert positions.grad is not None
    assert bool((positions.grad != 0).all())


def test_what_cannot_be_interpolated_is_said() -> None:
    with pytest.raises(ValueError, match=r"got \(1, 13, 4\); only those of a square grid"):
        interpolate_positions(torch.randn(1, 13, 4), (2, 2))
    with pytest.raises(ValueError, match="not 0 x 3"):
        interpolate_positions(torch.randn(1, 17, 4), (0, 3))


@torch.no_grad()
@pytest.mark.parametrize("arch", ["crate_demo", "vit_tiny"])
def test_learned_positions_serve_layers_without_a_class_token(arch: str) -> None:
    small = {"width": 24, "heads": 3, "depth": 1, "image_size": 16, "patch_size": 4, "pool": "mean"}
    config = model_config(ModelSection(arch=arch, class_token=False, **small), num_classes=5)
    model = initialise(config, seed=0).eval()
    assert model.pos_embedding.shape == (1, 16, 24)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 5)
    seen = model.forward_intermediates(torch.randn(2, 3, 8, 24))
    assert (seen.features[-1].shape, seen.grid) == ((2, 12, 24), (2, 6))
    larger = replace(config, image_size=24)
    adapted = adapt(model.state_dict(), config, larger, new_head=False)
    initialise(larger, seed=1).load_state_dict(adapted.state_dict)
