"""ISTA, CRATE's token-wise part: a step of sparse coding in a learned dictionary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crate_dist.models.config import ModelConfig
from crate_dist.models.matmul import addmm, linear
from crate_dist.models.rates import Measures, coherence
from crate_dist.models.sizes import ista_in_one_product
from crate_dist.models.tokenwise.tokenwise import TokenWise


class ISTA(TokenWise):
    """One step of iterative shrinkage-thresholding for non-negative sparse codes (arXiv 2306.01129, section 2.4).

        Z⁺ = ReLU(Z + η Dᵀ(Z - D Z) - η λ)

    which descends λ‖A‖₁ + ½‖Z - D A‖² over A ≥ 0 from A = Z. With tokens as the rows of z there are two ways to it:

        z + η ((z - z Dᵀ) D - λ)     two products of the tokens
        z + η (z (D - DᵀD) - λ)      one_product: one of the tokens, and one of the dictionary with itself in each pass

    `sizes.ista_in_one_product` says which takes fewer operations. D - DᵀD is summed in fp32 and rounded once, so that
    in bf16 its outputs and gradients are as near to the exact ones as the first way's, those of the tokens nearer.
    """

    key = "ista"
    one_product = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.step, self.threshold = config.ista_step, config.ista_threshold
        self.dictionary = nn.Parameter(torch.empty(config.dim, config.dim))
        nn.init.kaiming_uniform_(self.dictionary)

    def plan(self, tokens: int) -> None:
        """Takes the way with fewer operations for so many tokens at a time."""
        self.one_product = ista_in_one_product(tokens, len(self.dictionary))

    def forward(self, z: Tensor) -> Tensor:
        """(b, n, d) -> (b, n, d), no entry below zero"""
        d = self.dictionary
        one = self.one_product
        gradient = linear(z, addmm(d, d.t(), d, alpha=-1).t()) if one else linear(z - linear(z, d), d.t())
        # In place where nothing needs the value before: one tensor of the tokens' size is made, not four. The threshold
        # goes first: ηλ is about one step of bf16 at 1, and taken from the sum it would be rounded to all or nothing.
        return torch.add(z, gradient.sub_(self.threshold), alpha=self.step).relu_()

    def code(self, z: Tensor) -> Tensor:
        """Returns the codes of tokens (b, n, d), which are its output."""
        return self.forward(z)

    def measures(self, z: Tensor) -> Measures:
        """Returns the coherence of the dictionary."""
        return {"coherence": coherence(self.dictionary)}

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"dim={len(self.dictionary)}, step={self.step}, threshold={self.threshold}"
