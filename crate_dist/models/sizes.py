"""The published sizes of CRATE and the demo's, and which way of computing suits a size. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from crate_dist.config import ArchName


@dataclass(frozen=True)
class ArchDims:
    """Width, number of layers, and number of heads; each head has dim // heads features."""

    dim: int
    depth: int
    heads: int


# Parameters at 224 pixels, patch 16, 1,000 classes.
ARCHS: dict[ArchName, ArchDims] = {
    "crate_demo": ArchDims(dim=96, depth=4, heads=4),
    "crate_tiny": ArchDims(dim=384, depth=12, heads=6),  # 6.09 M
    "crate_small": ArchDims(dim=576, depth=12, heads=12),  # 13.12 M
    "crate_base": ArchDims(dim=768, depth=12, heads=12),  # 22.80 M
    "crate_large": ArchDims(dim=1024, depth=24, heads=16),  # 77.64 M
}


def ista_in_one_product(tokens: int, dim: int) -> bool:
    """Says whether ISTA on `tokens` tokens of `dim` features takes fewer operations by z (D - DᵀD) than (z - z Dᵀ) D.

    With N tokens the second takes 2 N d² multiply-adds forward and 4 N d² backward; the first N d² + d³ and twice that.
    What is computed again for the backward pass repeats the forward pass: the comparison is the same in every case.
    """
    return tokens > dim
