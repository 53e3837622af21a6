"""TSSA, ToST's token mixer: attention without pairs of tokens, linear in their number."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from crate_dist.models.config import ModelConfig
from crate_dist.models.matmul import Linear
from crate_dist.models.mixers.mixer import SubspaceMixer
from crate_dist.models.rates import Measures, entropy

_SMALLEST_NORM = 1e-12
_SMALLEST_SHARE = 1e-8


class TSSA(SubspaceMixer):
    """Token statistics self-attention (Wu et al. 2024, arXiv 2412.17810, equation 10).

    A step on the variational form of the coding rate, which bounds log det by the second moments of the tokens'
    coordinates in each subspace, so that no token looks at another (Z: tokens as columns):

        W_k  = U_kᵀ Z + b_k
        Π    = softmax over k of temp_k ‖u_k‖²,  u = W with each coordinate divided by its norm over the tokens
        m_k  = Σ_n π_k W_k² / Σ_n π_k            the second moment of each coordinate, of the tokens of subspace k
        out  = -V [Π_k W_k / (1 + m_k)]_k + c    a coordinate with much power is damped more

    As in the published code: V is learned, with a bias, where the derivation has the U_k; the step size is in V; u is
    normalised over the tokens of one image, and so depends on how many there are; dropout of attention is of 1 / (1 +
    m). `temperature` is a matrix (h, 1), which is why it decays with the weights; the code that would except it asks
    the whole model alone. There is no b_k where `in_bias` is off, as in the code of CBT.
    Time and memory are O(n d) beside the two projections.
    """

    key = "tssa"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.subspaces = Linear(config.dim, config.dim, bias=config.in_bias)
        self.temperature = nn.Parameter(torch.ones(config.heads, 1))
        self.out = Linear(config.dim, config.dim, bias=config.out_bias)
        self.gate_dropout = nn.Dropout(config.dropout)
        self.dropout = nn.Dropout(config.dropout)

    def project(self, z: Tensor) -> Tensor:
        """Projects tokens (b, n, d) to the coordinates of each subspace: w = U z + b, (b, h, n, p)."""
        return rearrange(self.subspaces(z), "b n (h p) -> b h n p", h=self.heads)

    def attend(self, w: Tensor) -> Tensor:
        """Damps projections (b, h, n, p) by their statistics over tokens and mixes them to tokens (b, n, d)."""
        membership, gate = self._statistics(w)
        damping = membership * self.gate_dropout(gate)
        # As the tokens lie, (b, n, h, p): neither the way in nor the way out is a copy.
        damped = w.transpose(1, 2) * damping.transpose(1, 2).to(w.dtype)
        return self.dropout(self.out(damped.flatten(2).neg_()))

    def membership(self, w: Tensor) -> Tensor:
        """Returns Π of projections (b, h, n, p), fp32 (b, h, n): how much of each token each subspace takes."""
        return self._statistics(w)[0].squeeze(-1)

    def gate(self, w: Tensor) -> Tensor:
        """Returns 1 / (1 + m) of projections (b, h, n, p), fp32 (b, h, p): what is left of each coordinate."""
        return self._statistics(w)[1].squeeze(-2)

    def measures(self, w: Tensor) -> Measures:
        """Returns what Π and the statistics of projections (b, h, n, p) say, each head's, (b, h), or all heads', (b,).

        membership: Σ_n π_k / n, the share of the tokens that a head takes
        membership_entropy: of a token over the heads, mean over the tokens: 1 undecided, 0 one head has all of it
        membership_spread: entropy of a head over the tokens: 1 it takes all alike, 0 a single one
        head_rate: a head's part of the variational coding rate, membership times ½ Σ_i log(1 + m_ki), in nats
        variational_rate: its sum over the heads, the paper's R^var with f(x) = log(1 + x), of which the layer is a step
        """
        membership, gate = self.membership(w).double(), self.gate(w).double()
        share = membership.mean(dim=-1)
        rate = -share * gate.log().sum(dim=-1) / 2
        return super().measures(w) | {
            "membership": share,
            "membership_entropy": entropy(membership, dim=1).mean(dim=-1),
            "membership_spread": entropy(membership, dim=-1),
            "head_rate": rate,
            "variational_rate": rate.sum(dim=-1),
        }

    def _statistics(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Returns Π (b, h, n, 1) and 1 / (1 + m) (b, h, 1, p) of projections (b, h, n, p), in fp32.

        No product of matrices: with so few columns they are slower than sums, and autocast would round their factors.
        """
        power = w.float().square()
        share = power.sum(-2, keepdim=True).clamp(min=_SMALLEST_NORM**2).reciprocal()
        membership = ((power * share).sum(-1, keepdim=True) * self.temperature[:, None].float()).softmax(dim=1)
        weights = membership / (membership.sum(-2, keepdim=True) + _SMALLEST_SHARE)
        moment = (weights * power).sum(-2, keepdim=True)
        return membership, (1 + moment).reciprocal()
