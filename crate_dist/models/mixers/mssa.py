"""MSSA, CRATE's token mixer: a step that lowers the coding rate of the tokens in learned subspaces."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from crate_dist.models.config import ModelConfig
from crate_dist.models.matmul import Linear
from crate_dist.models.mixers.mixer import SubspaceMixer


class MSSA(SubspaceMixer):
    """Multi-head subspace self-attention (arXiv 2306.01129, section 2.3).

        SSA(Z | U_k) = (U_kᵀ Z) softmax((U_kᵀ Z)ᵀ (U_kᵀ Z))
        MSSA(Z)      = W [SSA(Z | U_1); …; SSA(Z | U_K)]

    One projection serves as query, key and value, so this is attention with Q = K = V. As in the published code,
    the softmax is scaled by 1 / √p and W is learned, with a bias unless out_bias is off, where the derivation has a
    multiple of [U_1 … U_K]; with a single head there is no W.
    """

    key = "mssa"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, self.heads, self.attention_dropout = config.dim, config.heads, config.dropout
        self.subspaces = Linear(dim, dim, bias=False)
        self.out = nn.Identity() if self.heads == 1 else Linear(dim, dim, bias=config.out_bias)
        self.dropout = nn.Dropout(0.0 if self.heads == 1 else config.dropout)

    def project(self, z: Tensor) -> Tensor:
        """Projects tokens (b, n, d) to the coordinates of each subspace: w = Uᵀ z, (b, h, n, p)."""
        return rearrange(self.subspaces(z), "b n (h p) -> b h n p", h=self.heads)

    def attend(self, w: Tensor) -> Tensor:
        """Compresses projections (b, h, n, p) against each other and mixes them back to tokens (b, n, d)."""
        # Three views of the tokens: their gradients are summed where the tokens lie, those of w would be copied there.
        tokens = w.transpose(1, 2)
        q, k, v = (tokens.transpose(1, 2) for _ in range(3))
        compressed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attention_dropout if self.training else 0.0)
        return self.dropout(self.out(rearrange(compressed, "b h n p -> b n (h p)")))

    def attention(self, w: Tensor, queries: slice = slice(None)) -> Tensor:
        """Returns softmax(w wᵀ / √p) of projections (b, h, n, p): fp32 (b, h, n, n); rows sum to one."""
        w = w.float()
        return (w[..., queries, :] @ w.mT * w.shape[-1] ** -0.5).softmax(dim=-1)
