"""Softmax attention, the token mixer of ViT (Vaswani et al. 2017, arXiv 1706.03762, section 3.2)."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from crate_dist.models.config import ModelConfig
from crate_dist.models.matmul import Linear
from crate_dist.models.mixers.mixer import Mixer


class Attention(Mixer):
    """Multi-head self-attention with projections of their own for query, key and value.

    Head(z) = softmax(q kᵀ / √p) v;  Attention(z) = W [Head_1; …; Head_h]. The projections have a bias if `in_bias`, W
    if `out_bias`.
    """

    key = "attention"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_dropout = config.dropout
        self.qkv = Linear(config.dim, 3 * config.dim, bias=config.in_bias)
        self.out = Linear(config.dim, config.dim, bias=config.out_bias)
        self.dropout = nn.Dropout(config.dropout)

    def project(self, z: Tensor) -> Tensor:
        """Projects tokens (b, n, d) to queries, keys and values: (b, 3, h, n, p)."""
        return rearrange(self.qkv(z), "b n (three h p) -> b three h n p", three=3, h=self.heads)

    def attend(self, w: Tensor) -> Tensor:
        """Lets queries read values by keys, (b, 3, h, n, p), and mixes the heads to tokens (b, n, d)."""
        q, k, v = w.unbind(1)
        read = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attention_dropout if self.training else 0.0)
        return self.dropout(self.out(rearrange(read, "b h n p -> b n (h p)")))

    def keys(self, w: Tensor) -> Tensor:
        """Returns the keys, (b, h, n, p)."""
        return w[:, 1]

    def attention(self, w: Tensor, queries: slice = slice(None)) -> Tensor:
        """Returns softmax(q kᵀ / √p) in fp32, (b, h, n, n); rows sum to one."""
        q, k, _ = w.float().unbind(1)
        return (q[..., queries, :] @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)
