"""ODL, the token-wise part of CRATE-α: sparse coding in an overcomplete learned dictionary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crate_dist.models.config import ModelConfig
from crate_dist.models.matmul import linear
from crate_dist.models.rates import Measures, alignment, coherence
from crate_dist.models.tokenwise.tokenwise import TokenWise

_OF_D1 = ("decoder_coherence", "decoder_alignment")


class ODL(TokenWise):
    """Overcomplete dictionary learning (Yang et al. 2024, arXiv 2405.20299, section 3.2).

    Two steps of iterative shrinkage-thresholding in a dictionary D, and the way back by another, D1:

        Z1  = ReLU(η (Dᵀ Z - λ))
        Z2  = ReLU(Z1 - η Dᵀ(D Z1 - Z) - η λ)
        out = D1 Z2

    which descend λ‖A‖₁ + ½‖Z - D A‖² over A ≥ 0 from A = 0. D, D1: (d, m) with m = `ratio` d atoms; η: `ista_step`;
    λ: `ista_threshold`. D1 is a dictionary of its own (the paper's "decoupled"); `CoupledODL` returns by D.

    With tokens as the rows of x, and c = Z1 / η and e = Z2 / η, no product but the four above is needed, thresholds are
    biases of products, and η scales what has the tokens' size, not the atoms':

        c = relu(x D - λ);  r = x - η c Dᵀ;  e = relu(r D - λ + c);  out = η e D1ᵀ
    """

    key = "odl"
    decoupled = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.step, self.threshold = config.ista_step, config.ista_threshold
        self.dictionary = _dictionary(config)
        if self.decoupled:
            self.out = _dictionary(config)

    def _scaled_code(self, x: Tensor) -> Tensor:
        """Returns Z2 / η of tokens (b, n, d): (b, n, m)."""
        d = self.dictionary
        shift = d.new_full(d.shape[1:], -self.threshold)
        # In place where nothing needs the value before: each line makes one tensor, of the atoms' size or the tokens'.
        c = linear(x, d.t(), shift).relu_()
        residue = torch.sub(x, linear(c, d), alpha=self.step)
        return linear(residue, d.t(), shift).add_(c).relu_()

    def code(self, z: Tensor) -> Tensor:
        """Returns the sparse code Z2 of tokens: (b, n, d) -> (b, n, m), no entry below zero."""
        return self._scaled_code(z).mul(self.step)

    def forward(self, z: Tensor) -> Tensor:
        """(b, n, d) -> (b, n, d)"""
        return linear(self._scaled_code(z), self.out if self.decoupled else self.dictionary).mul_(self.step)

    def measures(self, z: Tensor) -> Measures:
        """Returns the coherence of D and of D1, and the cosine of the two: 1 before they are decoupled."""
        if not self.decoupled:
            coupled = "D1 is D: the dictionaries are coupled"
            return {"coherence": coherence(self.dictionary)} | dict.fromkeys(_OF_D1, coupled)
        decoder = coherence(self.out), alignment(self.dictionary, self.out)
        return {"coherence": coherence(self.dictionary), **dict(zip(_OF_D1, decoder, strict=True))}

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        dim, atoms = self.dictionary.shape
        return f"dim={dim}, atoms={atoms}, step={self.step}, threshold={self.threshold}"


class CoupledODL(ODL):
    """The same with D1 = D: the paper's ablation before its dictionaries are decoupled."""

    decoupled = False


def _dictionary(config: ModelConfig) -> nn.Parameter:
    """Draws a dictionary as the published training code does: uniform, of variance 2 / d whatever the ratio.

    Its PyTorch file, which only evaluates, would draw with the variance 2 / m.
    """
    empty = nn.Parameter(torch.empty(config.dim, config.ratio * config.dim))
    nn.init.kaiming_uniform_(empty, mode="fan_out")
    return empty
