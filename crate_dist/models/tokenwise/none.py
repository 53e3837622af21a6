"""No token-wise part: a layer whose mixer is alone."""

from __future__ import annotations

from torch import Tensor

from crate_dist.models.config import ModelConfig
from crate_dist.models.tokenwise.tokenwise import TokenWise


class NoTokenWise(TokenWise):
    """Stands where a layer has no token-wise part, as in attention-only models; the layer then ends with its mixer."""

    key = "none"
    no_code = "is not there"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def forward(self, z: Tensor) -> Tensor:
        """(b, n, d) -> (b, n, d), as they are"""
        return z
