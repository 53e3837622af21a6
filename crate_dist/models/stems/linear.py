"""The stem of ViT and CRATE-α: each patch by one linear map, which is a convolution as wide as its stride."""

from __future__ import annotations

from collections.abc import Mapping

from einops import rearrange
from torch import Tensor

from crate_dist.models.config import CHANNELS, ModelConfig
from crate_dist.models.matmul import Linear
from crate_dist.models.stems.stem import Stem, resize_map


class LinearStem(Stem):
    """Square patches, each flattened row by row with the channel fastest, to tokens by one map with a bias.

    The published codes have a convolution of stride `patch_size`. It is kept as the matrix (d, 3 p²) that it is: it
    runs as one product of the patches, and looks like the map in CRATE's stem. `weights/` turns the one into the other.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = Linear(CHANNELS * config.patch_size**2, config.dim)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, height, width) -> (b, patches, d)"""
        s = self.patch_size
        return self.proj(rearrange(images, "b c (row y) (col x) -> b (row col) (y x c)", y=s, x=s))

    @classmethod
    def resized(cls, weights: Mapping[str, Tensor], old: int, new: int) -> dict[str, Tensor]:
        """Returns the weights for patches of new x new pixels that show the same, of those for old x old."""
        return resize_map(weights, old, new)
