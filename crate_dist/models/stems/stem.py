"""What every stem offers, and how a map of patches is resized."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from crate_dist.models.config import CHANNELS


class Stem(nn.Module, ABC):
    """From images to patches, built of a ModelConfig. It is the model's `patch_embed`."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, height, width) -> (b, patches, d)"""

    @classmethod
    def resized(cls, weights: Mapping[str, Tensor], old: int, new: int) -> dict[str, Tensor] | None:
        """Returns the stem's weights, by its own names, for patches of new x new pixels that show the same as its old.

        None: weights for patches of one size tell nothing of another, or it is not known how.
        """
        return None


def resize_map(weights: Mapping[str, Tensor], old: int, new: int) -> dict[str, Tensor]:
    """Resizes `proj`, one map of patches that are flattened row by row with the channel fastest.

    FlexiViT's pseudo-inverse resize (Beyer et al. 2023, arXiv 2212.08013, section 3.4): with B the matrix that resizes
    a patch, W B⁺ B x = W x where patches grow, and as nearly as can be where they shrink. Where a normalisation,
    `norm_in`, comes before it, its scale and shift, one per pixel, are first taken into W and the bias.
    """
    weight, bias = (weights[f"proj.{name}"].double() for name in ("weight", "bias"))
    scale, shift = torch.ones(weight.shape[1]).double(), torch.zeros(weight.shape[1]).double()
    normed = "norm_in.weight" in weights
    if normed:
        scale, shift = (weights[f"norm_in.{name}"].double() for name in ("weight", "bias"))
    each_pixel = torch.eye(old**2, dtype=torch.float64).view(old**2, 1, old, old)
    resize = interpolate(each_pixel, (new, new), mode="bicubic", antialias=True).flatten(1).T  # (new², old²)
    pixels = (weight * scale).unflatten(1, (old**2, CHANNELS))
    resized = torch.einsum("dpc,pq->dqc", pixels, torch.linalg.pinv(resize)).flatten(1)
    norm = {"norm_in.weight": torch.ones(resized.shape[1]), "norm_in.bias": torch.zeros(resized.shape[1])}
    proj = {"proj.weight": resized.float(), "proj.bias": (bias + weight @ shift).float()}
    return {**weights, **(norm if normed else {}), **proj}
