"""Interpolates learned positions to another grid of patches than the one they were learned on."""

from __future__ import annotations

import math

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, cat


def interpolate_positions(pos_embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """Fits positions (1, n, d), the class token first, to `grid` = (rows, columns): (1, rows * columns + 1, d).

    The patches' positions, learned on a square grid, are taken for samples of a smooth function and interpolated
    bicubically, in fp32, without aliasing where the new grid is coarser; the class token's stays as it is. On the grid
    that they have, the very same tensor is returned.

    Raises ValueError: when the patches' positions form no square, or the grid has no rows or columns.
    """
    patches = pos_embedding.shape[1] - 1
    side = math.isqrt(max(patches, 0))
    if pos_embedding.ndim != 3 or side == 0 or side * side != patches:
        raise ValueError(
            f"expected positions of shape (1, 1 + rows * rows, d), got {tuple(pos_embedding.shape)}; "
            "only those of a square grid can be interpolated"
        )
    if min(grid) < 1:
        raise ValueError(f"a grid has one row and one column at least, not {grid[0]} x {grid[1]}")
    if tuple(grid) == (side, side):
        return pos_embedding
    square = rearrange(pos_embedding[:, 1:], "1 (row col) d -> 1 d row col", row=side).float()
    resized = F.interpolate(square, size=tuple(grid), mode="bicubic", align_corners=False, antialias=True)
    return cat((pos_embedding[:, :1], rearrange(resized, "1 d row col -> 1 (row col) d").to(pos_embedding)), dim=1)
