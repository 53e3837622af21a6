"""Measures the white box: the compression of each layer, its sparsity, and its attention.

    R^c(Z; U_1 … U_K) = Σ_k ½ log det(I + p / (n ε²) W_kᵀ W_k),   W_k = U_kᵀ LN(Z), each token scaled to length 1

is the coding rate in nats (arXiv 2306.01129, section 2.3, and its figure 3), measured as the published
code does: of the projections that MSSA reads, class token included, with ε² = 0.01 and tokens of length 1, so that it
tells how far tokens spread in the subspaces and not how long they are. Sparsity is the share of exact zeros among the
entries of ISTA's output; the paper's figures show its complement, ‖Z‖₀ / (d n).

Shapes: L layers, b images, n tokens (the class token first), d features, h heads, p = d / h.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from crate_dist.models.residuals.layer import Layer
from crate_dist.models.transformer import Transformer

QUANTIZATION = 0.01
"""ε² of the coding rate, squared error per token that a code may leave; the published code's value."""


def coding_rate(projections: Tensor, quantization: float = QUANTIZATION) -> Tensor:
    """Returns R^c in nats of each image: projections (b, h, n, p) -> fp64 (b,), the sum over the heads' subspaces.

    The determinant is taken of the smaller of I + c W Wᵀ and I + c Wᵀ W, which are equal, by Cholesky in fp64: both
    have no eigenvalue below 1. A token that is zero adds nothing, where the published code gives not-a-number; what
    is not finite stays so.
    """
    w = F.normalize(projections.double(), dim=-1)
    tokens, width = w.shape[-2:]
    gram = w @ w.mT if tokens < width else w.mT @ w
    scaled = torch.eye(len(gram[0, 0]), dtype=gram.dtype, device=gram.device) + width / (tokens * quantization) * gram
    factor, _ = torch.linalg.cholesky_ex(scaled)
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1).sum(dim=-1)  # ½ log det = Σ log of the factor's diagonal


def zero_share(features: Tensor) -> Tensor:
    """Returns the share of exact zeros in each image's tokens: (b, n, d) -> fp64 (b,)."""
    return (features == 0).double().mean(dim=(1, 2))


def dead_token_share(features: Tensor) -> Tensor:
    """Returns the share of tokens of which nothing is left but zeros: (b, n, d) -> fp64 (b,)."""
    return (features == 0).all(dim=2).double().mean(dim=1)


def coherence(dictionary: Tensor) -> Tensor:
    """Returns μ(D), the largest |cosine| of two distinct columns of a dictionary (d, atoms), 0-d, between 0 and 1.

    Mutual coherence (Donoho and Huo 2001): the smaller, the fewer atoms explain each other, and the safer is what
    a sparse code says. A column of zeros has cosine 0 with every other.
    """
    atoms = F.normalize(dictionary.detach().double(), dim=0)
    cosines = (atoms.mT @ atoms).abs()
    return cosines.fill_diagonal_(0).max()


@dataclass(frozen=True)
class Profile:
    """The measures of a model's layers on some images. fp64 on the CPU, the first layer first.

    coding_rate: R^c of what each layer's MSSA reads, in nats, (L, b)
    compressed: R^c in the same subspaces of Z + MSSA(LN(Z)), what it makes of them, (L, b)
    zeros: share of zeros after ISTA, (L, b); dead_tokens: share of tokens that are all zero, (L, b)
    active: whether a feature is above zero in any token of any image, bool (L, d)
    coherence: of each layer's dictionary, (L,)
    """

    coding_rate: Tensor
    compressed: Tensor
    zeros: Tensor
    dead_tokens: Tensor
    active: Tensor
    coherence: Tensor

    @property
    def dead_features(self) -> Tensor:
        """Share of features that are zero in every token of every image, (L,)."""
        return 1 - self.active.double().mean(dim=1)

    @property
    def coding_rate_std(self) -> Tensor:
        """Spread over the images as published, dividing by b - 1; zeros for one image. (L,)"""
        return _std(self.coding_rate, correction=1)

    @property
    def zeros_std(self) -> Tensor:
        """Spread over the images as published, dividing by b. (L,)"""
        return _std(self.zeros, correction=0)

    def means(self) -> dict[str, list[float]]:
        """Returns the means over the images, by name and layer."""
        return {
            "coding_rate": self.coding_rate.mean(dim=1).tolist(),
            "coding_rate_change": (self.compressed - self.coding_rate).mean(dim=1).tolist(),
            "zeros": self.zeros.mean(dim=1).tolist(),
            "dead_tokens": self.dead_tokens.mean(dim=1).tolist(),
            "dead_features": self.dead_features.tolist(),
            "coherence": self.coherence.tolist(),
        }


@torch.no_grad()
def profile(model: Transformer, batches: Iterable[Tensor]) -> Profile:
    """Measures every layer on batches of images (b, 3, height, width) of one size, in the model's dtype and place.

    Layer by layer, so that no more than one layer's tokens are held. Draws no random number, changes no weight.
    """
    with _evaluating(model):
        parts = [_profile(model, images) for images in batches]
    return Profile(
        coding_rate=torch.cat([part.coding_rate for part in parts], dim=1),
        compressed=torch.cat([part.compressed for part in parts], dim=1),
        zeros=torch.cat([part.zeros for part in parts], dim=1),
        dead_tokens=torch.cat([part.dead_tokens for part in parts], dim=1),
        active=torch.stack([part.active for part in parts]).any(dim=0),
        coherence=parts[0].coherence,
    )


@torch.no_grad()
def class_attention_maps(model: Transformer, images: Tensor) -> Tensor:
    """Returns where the class token looks, all layers: (b, 3, height, width) -> fp32 (L, b, h, rows, cols)."""
    with _evaluating(model):
        inside = model.forward_intermediates(images)
    return torch.stack([inside.class_attention(layer) for layer in range(model.config.depth)])


@torch.no_grad()
def patch_projections(model: Transformer, images: Tensor, layer: int) -> Tensor:
    """Returns w = Uᵀ LN(z) of one layer by patch, heads side by side: (b, 3, height, width) -> fp32 (b, rows, cols, d).

    MSSA's w is query, key and value at once, hence these are the keys that the published pictures are made of.
    """
    rows, cols = (side // model.config.patch_size for side in images.shape[2:])
    with _evaluating(model):
        w = model.forward_intermediates(images).projections[layer]
    return w[:, :, 1:].float().transpose(1, 2).flatten(2).unflatten(1, (rows, cols))


def layer_gradient_norms(model: Transformer, images: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Returns ‖∂ loss / ∂ θ_ℓ‖₂ over the parameters of each layer ℓ, fp64 (L,), of the mean cross-entropy on images.

    A backward pass of its own: parameters' .grad are neither read nor written, and no hook on them runs.
    images: (b, 3, image_size, image_size); labels: int64 (b,)
    """
    sizes = [len(list(layer.parameters())) for layer in model.layers]
    parameters = [parameter for layer in model.layers for parameter in layer.parameters()]
    with _evaluating(model), torch.enable_grad():
        loss = F.cross_entropy(model(images).float(), labels, label_smoothing=label_smoothing)
        gradients = torch.autograd.grad(loss, parameters)
    squares = torch.stack([gradient.double().square().sum() for gradient in gradients])
    return torch.stack([part.sum() for part in squares.split(sizes)]).sqrt().cpu()


@contextmanager
def _evaluating(model: Transformer) -> Iterator[None]:
    """Turns dropout off, and back to what it was afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _profile(model: Transformer, images: Tensor) -> Profile:
    z = model.embed_any_size(images)
    rates, compressed, zeros, dead, active, coherences = [], [], [], [], [], []
    for layer in model.layers:
        assert isinstance(layer, Layer)
        w = layer.project(z)
        rates.append(coding_rate(w))
        compressed.append(coding_rate(layer.project(layer.compress(z, w))))
        z = layer.update(z, w)
        zeros.append(zero_share(z))
        dead.append(dead_token_share(z))
        active.append((z > 0).flatten(0, 1).any(dim=0))
        coherences.append(coherence(layer.get_parameter("ista.dictionary")))
    measured = (rates, compressed, zeros, dead, active, coherences)
    return Profile(*(torch.stack(values).cpu() for values in measured))


def _std(values: Tensor, correction: int) -> Tensor:
    return values.std(dim=1, correction=correction) if values.shape[1] > 1 else torch.zeros(len(values)).double()
