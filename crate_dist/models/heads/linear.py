"""CRATE's head."""

from __future__ import annotations

from torch import Tensor, nn

from crate_dist.models.config import ModelConfig
from crate_dist.models.heads.head import Head


class LinearHead(Head):
    """LayerNorm and Linear of the class token, or of the mean of all tokens, as pool says."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pool = config.pool
        self.norm = nn.LayerNorm(config.dim, eps=config.head_norm_eps)
        self.linear = nn.Linear(config.dim, config.num_classes)

    def features(self, z: Tensor) -> Tensor:
        """Returns what the linear map reads of tokens, (b, n, d) -> (b, d)."""
        features: Tensor = self.norm(z.mean(dim=1) if self.pool == "mean" else z[:, 0])
        return features
