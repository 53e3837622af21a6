"""What the parts of a model and the white box measure of tokens, codes and weights: functions of tensors.

    R(W) = ½ log det(I + p / (n ε²) Wᵀ W),   W: n tokens of p features, each scaled to length 1

is the coding rate in nats (arXiv 2306.01129, section 2.3, and its figure 3), measured as the published code does: with
ε² = 0.01 and tokens of length 1, so that it tells how far tokens spread and not how long they are.
R^c = Σ_k R(U_kᵀ LN(Z)) is that of the tokens in each subspace, and R(LN(Z)) that of the tokens themselves, as the mixer
reads them. Their difference is not taken: in either the tokens have length 1 anew, and where they are fewer than their
features, R is bounded by their number and R^c is not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

QUANTIZATION = 0.01
"""ε² of the coding rate, squared error per token that a code may leave; the published code's value."""
Measures = dict[str, Tensor | str]
"""Name -> one number of each image (b,), of each image and head (b, h), or one alone; a text says why there is none."""
_NOTHING = 1e-30


def coding_rate(projections: Tensor, quantization: float = QUANTIZATION, scaled: bool = True) -> Tensor:
    """Returns R^c in nats of each image: projections (b, h, n, p) -> fp64 (b,), the sum over the heads' subspaces.

    scaled: tokens are scaled to length 1; otherwise they have the length that they have, as CBT's published code has it
    The determinant is taken of the smaller of I + c W Wᵀ and I + c Wᵀ W, which are equal, by Cholesky in fp64: both
    have no eigenvalue below 1. A token that is zero adds nothing, where the published code gives not-a-number; what
    is not finite stays so.
    """
    w = F.normalize(projections.double(), dim=-1) if scaled else projections.double()
    tokens, width = w.shape[-2:]
    gram = w @ w.mT if tokens < width else w.mT @ w
    inside = torch.eye(len(gram[0, 0]), dtype=gram.dtype, device=gram.device) + width / (tokens * quantization) * gram
    factor, _ = torch.linalg.cholesky_ex(inside)
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1).sum(dim=-1)  # ½ log det = Σ log of the factor's diagonal


def zero_share(codes: Tensor) -> Tensor:
    """Returns the share of exact zeros in each image's codes: (b, n, m) -> fp64 (b,)."""
    return (codes == 0).double().mean(dim=(1, 2))


def dead_token_share(codes: Tensor) -> Tensor:
    """Returns the share of tokens of which nothing is left but zeros: (b, n, m) -> fp64 (b,)."""
    return (codes == 0).all(dim=2).double().mean(dim=1)


def coherence(dictionary: Tensor) -> Tensor:
    """Returns μ(D), the largest |cosine| of two distinct columns of a dictionary (d, atoms), 0-d, between 0 and 1.

    Mutual coherence (Donoho and Huo 2001): the smaller, the fewer atoms explain each other, and the safer is what
    a sparse code says. A column of zeros has cosine 0 with every other.
    """
    atoms = F.normalize(dictionary.detach().float(), dim=0)
    return (atoms.mT @ atoms).abs_().fill_diagonal_(0).max().double().clamp(max=1)


def subspace_coherence(bases: Tensor) -> Tensor:
    """Returns the largest cosine of two subspaces' U_k U_kᵀ and U_l U_lᵀ, bases (h, p, d) of h > 1, 0-d, from 0 to 1.

    That is ‖U_kᵀ U_l‖² / (‖U_kᵀ U_k‖ ‖U_lᵀ U_l‖) in Frobenius norms, and for orthonormal bases the mean squared cosine
    of their principal angles: 0 where the subspaces are orthogonal, 1 where they are the same, p / d for random ones.
    """
    heads, width, _ = bases.shape
    rows = bases.detach().float().flatten(0, 1)
    squares = (rows @ rows.mT).square().unflatten(1, (heads, width)).unflatten(0, (heads, width)).sum(dim=(1, 3))
    own = squares.diagonal().sqrt()
    cosines = squares / (own[:, None] * own).clamp(min=_NOTHING)
    return cosines.fill_diagonal_(0).max().double().clamp(max=1)


def orthonormality_error(bases: Tensor) -> Tensor:
    """Returns how far bases (h, p, d) are from orthonormal ones of any length, their mean, 0-d.

    ‖U_kᵀ U_k / s - I‖ / √p in Frobenius norms, s the mean of the diagonal: 0 where the vectors are orthogonal and of
    one length, √(p - 1) where they are all the same, about √(p / d) for random ones.
    """
    bases = bases.detach().float()
    gram = bases @ bases.mT
    lengths = gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1).clamp(min=_NOTHING)[:, None, None]
    off = gram / lengths - torch.eye(gram.shape[-1], device=gram.device)
    return (off.norm(dim=(-2, -1)) / gram.shape[-1] ** 0.5).mean().double()


def alignment(a: Tensor, b: Tensor) -> Tensor:
    """Returns the cosine of two matrices of one shape, 0-d: 1 where one is a positive multiple of the other."""
    return F.cosine_similarity(a.detach().double().flatten(), b.detach().double().flatten(), dim=0)


def entropy(shares: Tensor, dim: int) -> Tensor:
    """Returns the entropy of what is not negative along `dim`, scaled to a sum of 1, as a share of the largest: 0 … 1.

    0 where one has all, 1 where all have the same; along a dimension of 1 it is 0.
    """
    shares = shares.double()
    shares = shares / shares.sum(dim=dim, keepdim=True).clamp(min=_NOTHING)
    most = torch.tensor(float(max(shares.shape[dim], 2)), dtype=shares.dtype, device=shares.device).log()
    return -torch.special.xlogy(shares, shares).sum(dim=dim) / most
