"""Positions of one grid of patches serve on another."""

from __future__ import annotations

import pytest
import torch

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
