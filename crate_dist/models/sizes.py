"""The published sizes of CRATE and the demo's. Imports no torch."""

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
