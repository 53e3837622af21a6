"""The two-layer perceptron of ViT and ToST."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from crate_dist.models.config import ModelConfig
from crate_dist.models.matmul import Linear
from crate_dist.models.tokenwise.tokenwise import TokenWise


class MLP(TokenWise):
    """out(GELU(hidden(z))) with biases, `ratio` d hidden features, and the exact GELU (arXiv 1606.08415)."""

    key = "mlp"
    no_code = "makes no sparse code (the exact GELU is zero almost nowhere)"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        features = config.ratio * config.dim
        self.hidden = Linear(config.dim, features)
        self.out = Linear(features, config.dim)

    def forward(self, z: Tensor) -> Tensor:
        """(b, n, d) -> (b, n, d)"""
        return self.out(F.gelu(self.hidden(z)))
