"""The layer of CRATE-α, ToST and ViT."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crate_dist.models.config import ModelConfig
from crate_dist.models.residuals.layer import Layer, dropped
from crate_dist.models.tokenwise.none import NoTokenWise


class PreNormLayer(Layer):
    """Two residual branches: z += γ1 m(LN z), then z += γ2 f(LN z); γ are vectors (d,), or not there.

    They are `<part>_scale` among the parameters (LayerScale, Touvron et al. 2021, arXiv 2103.17239, section 2).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self._scaled = config.layer_scale > 0
        alone = isinstance(self.tokenwise, NoTokenWise)
        for key in self._keys[: 2 - alone] if self._scaled else ():
            self.register_parameter(f"{key}_scale", nn.Parameter(torch.full((config.dim,), config.layer_scale)))

    def compress(self, z: Tensor, w: Tensor, keep: Tensor | None = None) -> Tensor:
        """Returns z + γ1 m(LN z), (b, n, d)."""
        return self._add(z, self.mixer.attend(w), 0, keep)

    def sparsify(self, z: Tensor, keep: Tensor | None = None) -> Tensor:
        """Returns z + γ2 f(LN z), (b, n, d)."""
        return self._add(z, self.tokenwise(self.reads(z)), 1, keep)

    def _add(self, z: Tensor, branch: Tensor, number: int, keep: Tensor | None) -> Tensor:
        branch = dropped(branch, None if keep is None else keep[number])
        return torch.addcmul(z, branch, getattr(self, f"{self._keys[number]}_scale")) if self._scaled else z + branch
