"""Positions of patches: learned ones, fitted to other grids, and Fourier features, which any grid has."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, cat, nn


def interpolate_positions(pos_embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """Fits positions (1, n, d), the class token first where there is one, to `grid` = (rows, columns).

    The patches' positions, learned on a square grid, are taken for samples of a smooth function and interpolated
    bicubically, in fp32, without aliasing where the new grid is coarser; the class token's stays as it is. n tells
    whether there is one: no square is another one's successor but 1. On the grid that they have, the very same tensor
    is returned.

    Raises ValueError: when the patches' positions form no square, or the grid has no rows or columns.
    """
    side = math.isqrt(pos_embedding.shape[1])
    first = pos_embedding.shape[1] - side * side
    if pos_embedding.ndim != 3 or side == 0 or first > 1:
        raise ValueError(
            f"expected positions of shape (1, rows * rows, d), or one more for a class token, got "
            f"{tuple(pos_embedding.shape)}; only those of a square grid can be interpolated"
        )
    if min(grid) < 1:
        raise ValueError(f"a grid has one row and one column at least, not {grid[0]} x {grid[1]}")
    if tuple(grid) == (side, side):
        return pos_embedding
    square = rearrange(pos_embedding[:, first:], "1 (row col) d -> 1 d row col", row=side).float()
    resized = F.interpolate(square, size=tuple(grid), mode="bicubic", align_corners=False, antialias=True)
    patches = rearrange(resized, "1 d row col -> 1 (row col) d").to(pos_embedding)
    return cat((pos_embedding[:, :first], patches), dim=1)


_HIDDEN = 32
_TEMPERATURE = 10_000


class FourierPositions(nn.Module):
    """A linear map of sines and cosines of a patch's row and column (DETR, arXiv 2005.12872; so in XCiT and ToST).

    Rows and columns are counted from 1 and brought to the interval from 0 to 2π, whatever the grid. The features of
    one grid are kept, and no part of the state: they are a function of it.
    """

    features: Tensor

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.proj = nn.Linear(2 * _HIDDEN, dim)
        self.register_buffer("features", fourier_features(grid), persistent=False)

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """Returns the positions of rows x columns patches, (1, rows * columns, d)."""
        features = self.features if grid == self.grid else fourier_features(grid).to(self.features)
        # DeepSpeed rounds weights to bf16, and no buffer.
        return self.proj(features.to(self.proj.weight.dtype))


def fourier_features(grid: tuple[int, int]) -> Tensor:
    """Returns sines and cosines of rows, then of columns, at 16 frequencies each: fp32 (1, rows * columns, 64), CPU.

    The angle of frequency i is 2π row / rows / 10000^(i / 16); sines and cosines alternate.
    """
    with torch.device("cpu"):  # also where a model is built on "meta": no file of weights has them
        rates = _TEMPERATURE ** -(torch.arange(0, _HIDDEN, 2, dtype=torch.float64) / _HIDDEN)
        sides = [torch.arange(1, side + 1, dtype=torch.float64) * (2 * math.pi / side) for side in grid]
        rows, columns = (
            torch.stack(((angle := side[:, None] * rates).sin(), angle.cos()), dim=-1).flatten(1) for side in sides
        )
        every = (rows[:, None].expand(-1, len(columns), -1), columns.expand(len(rows), -1, -1))
        return cat(every, dim=-1).flatten(0, 1)[None].float()
