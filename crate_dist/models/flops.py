"""Counts the floating-point operations that a CRATE must compute. Imports no torch.

Counted are matrix products alone, 2 per multiply-add, in the fewest that the mathematics needs for a batch: what is
saved is not counted as work done, and so a saved product shows as a higher MFU, never as a lower one. A backward pass
counts twice its forward pass; what is computed again counts once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crate_dist.models.sizes import ista_in_one_product

if TYPE_CHECKING:
    from crate_dist.models.config import ModelConfig


def forward_flops(config: ModelConfig, images: int) -> int:
    """Counts the operations of one forward pass of `images` images; with its backward pass, three times that."""
    n, d = config.num_tokens, config.dim
    tokens = images * n
    mssa = tokens * d * d + 2 * tokens * n * d + (tokens * d * d if config.heads > 1 else 0)
    ista = tokens * d * d + (d**3 if ista_in_one_product(tokens, d) else tokens * d * d)
    patches = images * (n - 1) * 3 * config.patch_size**2 * d
    return 2 * (config.depth * (mssa + ista) + patches + images * d * config.num_classes)
