"""CRATE's stem."""

from __future__ import annotations

from collections.abc import Mapping

from einops import rearrange
from torch import Tensor, nn

from crate_dist.models.config import CHANNELS, ModelConfig
from crate_dist.models.matmul import Linear
from crate_dist.models.stems.stem import Stem, resize_map


class PatchEmbedding(Stem):
    """Square patches, each flattened row by row with the channel fastest, to tokens: LayerNorm, Linear, LayerNorm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        values = CHANNELS * config.patch_size**2
        self.norm_in = nn.LayerNorm(values)
        self.proj = Linear(values, config.dim)
        self.norm_out = nn.LayerNorm(config.dim)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, height, width) -> (b, patches, d)"""
        s = self.patch_size
        patches = rearrange(images, "b c (row y) (col x) -> b (row col) (y x c)", y=s, x=s)
        return self.norm_out(self.proj(self.norm_in(patches)))

    @classmethod
    def resized(cls, weights: Mapping[str, Tensor], old: int, new: int) -> dict[str, Tensor]:
        """Returns the weights for patches of new x new pixels that show the same, of those for old x old."""
        return resize_map(weights, old, new)
