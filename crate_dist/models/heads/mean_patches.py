"""The head of ViT without its class token: the mean over the patches, a norm, a linear map."""

from __future__ import annotations

from torch import Tensor, nn

from crate_dist.models.config import ModelConfig
from crate_dist.models.heads.head import Head


class MeanPatches(Head):
    """Linear(LN(mean of the patches)); the class token takes part in the layers and is left out here."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.first = int(config.class_token)
        self.norm = nn.LayerNorm(config.dim, eps=config.head_norm_eps)
        self.linear = nn.Linear(config.dim, config.num_classes)

    def features(self, z: Tensor) -> Tensor:
        """Returns what the linear map reads of tokens, (b, n, d) -> (b, d)."""
        features: Tensor = self.norm(z[:, self.first :].mean(dim=1))
        return features


class MeanPatchesTwice(MeanPatches):
    """The same with the norm applied twice, the same one, as the published comparison with ViT computes it.

    Its model normalises the pooled features, and again where timm's `forward_head` was to pool them.
    """

    def features(self, z: Tensor) -> Tensor:
        """Returns what the linear map reads of tokens, (b, n, d) -> (b, d)."""
        features: Tensor = self.norm(super().features(z))
        return features
