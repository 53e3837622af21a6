"""ToST's head: a class token that reads the patches in two blocks of class attention (CaiT, arXiv 2103.17239)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from crate_dist.models.config import ModelConfig
from crate_dist.models.heads.head import Head
from crate_dist.models.initial import drawn
from crate_dist.models.matmul import Linear
from crate_dist.models.tokenwise.mlp import MLP

_BLOCKS = 2


class ClassAttention(nn.Module):
    """Softmax attention with one query, the class token's; keys and values are of all tokens.

    As there is one query, keys and values are never computed for each token: W_k goes to the query's side and W_v
    behind the mean, for h products of the tokens instead of 2 d. The keys' bias adds the same to all scores: it decides
    nothing, and is there for the published files.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.dim, 3 * config.dim)
        self.out = Linear(config.dim, config.dim)
        self.map_dropout = nn.Dropout(config.dropout)
        self.dropout = nn.Dropout(config.dropout)

    def attention(self, z: Tensor) -> Tensor:
        """Returns where the class token of normalised tokens (b, 1 + n, d) looks: fp32 (b, h, 1 + n), sums of one."""
        to_query, to_key, _ = self.qkv.weight.chunk(3)
        query = F.linear(z[:, 0], to_query, self.qkv.bias[: len(to_query)]).unflatten(-1, (self.heads, -1))
        query = query * query.shape[-1] ** -0.5
        seen = torch.einsum("bhp,hpd->bhd", query, to_key.unflatten(0, (self.heads, -1)))
        return (seen @ z.mT).float().softmax(dim=-1)

    def forward(self, z: Tensor) -> Tensor:
        """Returns what the class token reads of normalised tokens (b, 1 + n, d): (b, 1, d)."""
        *_, to_value = self.qkv.weight.chunk(3)
        looks = self.map_dropout(self.attention(z)).to(z.dtype)
        read = torch.einsum("bhd,hpd->bhp", looks @ z, to_value.unflatten(0, (self.heads, -1)))
        # Where dropout leaves the looks no sum of one, the values' bias has its share of it.
        bias = looks.sum(-1, keepdim=True) * self.qkv.bias[-len(to_value) :].view(self.heads, -1)
        return self.dropout(self.out(rearrange(read + bias, "b h p -> b 1 (h p)")))


class ClassAttentionBlock(nn.Module):
    """The class token reads, then an MLP of it alone. As in the published code, patches change too, though unread:

        x   += γ1 [class attention; LN1 patches]     patches get their own normalised value once more
        x    = LN2 x                                 of all tokens, and the residual goes on from here
        cls += γ2 MLP(cls)
        patches += patches                           where the branch has them unchanged, they are doubled

    LN2 of all tokens is the published `tokens_norm=True`, which all its models have. There is no drop path in here.
    """

    attention_scale: nn.Parameter | None
    mlp_scale: nn.Parameter | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.attention = ClassAttention(config)
        self.mlp_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = MLP(config)
        for part in ("attention", "mlp"):
            scale = nn.Parameter(torch.full((config.dim,), config.layer_scale)) if config.layer_scale else None
            self.register_parameter(f"{part}_scale", scale)

    def forward(self, z: Tensor) -> Tensor:
        """(b, 1 + n, d) -> (b, 1 + n, d)"""
        normed = self.attention_norm(z)
        branch = torch.cat((self.attention(normed), normed[:, 1:]), dim=1)
        z = self.mlp_norm(_add(z, branch, self.attention_scale))
        return torch.cat((self._finish(z[:, :1]), 2 * z[:, 1:]), dim=1)

    def read(self, z: Tensor) -> Tensor:
        """Returns the class token alone of what `forward` returns, (b, d), without what only the patches need."""
        cls = _add(z[:, :1], self.attention(self.attention_norm(z)), self.attention_scale)
        return self._finish(self.mlp_norm(cls)).squeeze(1)

    def _finish(self, cls: Tensor) -> Tensor:
        return _add(cls, self.mlp(cls), self.mlp_scale)


class ClassAttentionHead(Head):
    """The class token is put before the patches, goes through two blocks, and is normalised and classified."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(drawn(1, 1, config.dim))
        self.blocks = nn.ModuleList(ClassAttentionBlock(config) for _ in range(_BLOCKS))
        self.norm = nn.LayerNorm(config.dim, eps=config.head_norm_eps)
        self.linear = nn.Linear(config.dim, config.num_classes)

    def begin(self, z: Tensor) -> Tensor:
        """Puts the class token before patches (b, n, d): (b, 1 + n, d)."""
        return torch.cat((self.cls_token.expand(len(z), -1, -1).to(z.dtype), z), dim=1)

    def features(self, z: Tensor) -> Tensor:
        """Returns the normalised class token behind the blocks, (b, n, d) -> (b, d)."""
        z = self.begin(z)
        *blocks, last = self.blocks
        for block in blocks:
            z = block(z)
        assert isinstance(last, ClassAttentionBlock)
        features: Tensor = self.norm(last.read(z))
        return features

    def attention(self, z: Tensor) -> Tensor:
        """Returns where the class token looks in each block, fp32 (blocks, b, h, 1 + n); rows sum to one."""
        z = self.begin(z)
        maps = list[Tensor]()
        for block in self.blocks:
            assert isinstance(block, ClassAttentionBlock)
            maps.append(block.attention.attention(block.attention_norm(z)))
            z = block(z)
        return torch.stack(maps)


def _add(z: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    return z + branch if scale is None else torch.addcmul(z, branch, scale)
