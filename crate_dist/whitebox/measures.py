"""Measures the white box, layer by layer: compression, sparsity, and what each part of the layer says of itself.

Of every layer: the coding rate of the tokens that its mixer reads, and where the mixer has subspaces, that in them, and
what the mixer makes of it (models/rates.py has the definitions). Of a token-wise part that makes a sparse code, ISTA
its output, the share of exact zeros among its entries; the paper's figures show its complement, ‖Z‖₀ / (d n). Whatever
else `measures` of the mixer and of the token-wise part return, by name. What a model does not have is told, not made
up.

Shapes: L layers, b images, n tokens, d features, h heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from crate_dist.models.rates import Measures, coding_rate, dead_token_share, zero_share
from crate_dist.models.residuals.layer import Layer
from crate_dist.models.transformer import Transformer

_OF_SUBSPACES = ("coding_rate", "coding_rate_change", "subspace_coherence", "orthonormality_error", "out_alignment")
_OF_CODES = ("zeros", "dead_tokens", "dead_features", "coherence")


@dataclass(frozen=True)
class Profile:
    """The measures of a model's layers on some images, by name. fp64 on the CPU, the first layer first.

    values: of each image, (L, b); of each image and head, (L, b, h); of each layer alone, (L,)
    missing: name of a measure that this model cannot have -> why
    mixer, tokenwise: the names of the layers' parts
    """

    values: Mapping[str, Tensor]
    missing: Mapping[str, str]
    mixer: str
    tokenwise: str

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def mean(self, name: str) -> Tensor:
        """Returns a measure's mean over images and heads, (L,)."""
        return self.values[name].flatten(1).mean(dim=1) if self.values[name].ndim > 1 else self.values[name]

    def std(self, name: str) -> Tensor:
        """Returns the spread over the images, (L,): of the mean over the heads; zeros for one image.

        As published: that of zeros divides by b, any other by b - 1.
        """
        values = self.values[name].flatten(2).mean(dim=2) if self.values[name].ndim > 2 else self.values[name]
        if values.ndim < 2 or values.shape[1] == 1:
            return torch.zeros(len(values)).double()
        return values.std(dim=1, correction=0 if name == "zeros" else 1)

    def means(self) -> dict[str, list[float]]:
        """Returns the means over images and heads, by name and layer."""
        return {name: self.mean(name).tolist() for name in self.values}

    def what_is_missing(self) -> list[str]:
        """Returns sentences such as "MLP makes no sparse code: no zeros, dead_tokens, dead_features, coherence"."""
        reasons = dict[str, list[str]]()
        for name, why in self.missing.items():
            reasons.setdefault(why, []).append(name)
        return [f"{why}: no {', '.join(names)}" for why, names in reasons.items()]


@torch.no_grad()
def profile(model: Transformer, batches: Iterable[Tensor]) -> Profile:
    """Measures every layer on batches of images (b, 3, height, width) of one size, in the model's dtype and place.

    Layer by layer, so that no more than one layer's tokens are held. Draws no random number, changes no weight.
    """
    with evaluating(model):
        parts = [_profile(model, images) for images in batches]
    layers = [layer for layer in model.layers if isinstance(layer, Layer)]
    values, missing = dict[str, Tensor](), dict[str, str]()
    for name, first in parts[0][0].items():
        if isinstance(first, str):
            missing[name] = first
        elif first.ndim > 1:
            values[name] = torch.cat([_tensor(measured[name]) for measured, _ in parts], dim=1)
        else:
            values[name] = first
        if name == "dead_tokens" and isinstance(first, Tensor):
            used = torch.stack([active for _, active in parts if active is not None]).any(dim=0)
            values["dead_features"] = 1 - used.double().mean(dim=1)
    return Profile(values, missing, type(layers[0].mixer).__name__, type(layers[0].tokenwise).__name__)


def layer_gradient_norms(model: Transformer, images: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Returns ‖∂ loss / ∂ θ_ℓ‖₂ over the parameters of each layer ℓ, fp64 (L,), of the mean cross-entropy on images.

    A backward pass of its own: parameters' .grad are neither read nor written, and no hook on them runs.
    images: (b, 3, image_size, image_size); labels: int64 (b,)
    """
    sizes = [len(list(layer.parameters())) for layer in model.layers]
    parameters = [parameter for layer in model.layers for parameter in layer.parameters()]
    with evaluating(model), torch.enable_grad():
        loss = F.cross_entropy(model(images).float(), labels, label_smoothing=label_smoothing)
        gradients = torch.autograd.grad(loss, parameters)
    squares = torch.stack([gradient.double().square().sum() for gradient in gradients])
    return torch.stack([part.sum() for part in squares.split(sizes)]).sqrt().cpu()


@contextmanager
def evaluating(model: Transformer) -> Iterator[None]:
    """Turns training off, dropout with it, and back to what it was afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _profile(model: Transformer, images: Tensor) -> tuple[Measures, Tensor | None]:
    """Returns the measures of all layers, (L, …) each, and which features of the codes are ever used, bool (L, m)."""
    z = model.embed_any_size(images)
    measured: list[Measures] = []
    active: list[Tensor] = []
    for layer in model.layers:
        assert isinstance(layer, Layer)
        reads = layer.norms[0](z)
        w = layer.mixer.project(reads)
        compressed = layer.compress(z, w)
        values = _rates(layer, reads, w, compressed)
        read = layer.reads(compressed)
        code = layer.tokenwise.code(read)
        if code is None:
            values |= dict.fromkeys(_OF_CODES, f"{type(layer.tokenwise).__name__} {layer.tokenwise.no_code}")
        else:
            values |= {"zeros": zero_share(code), "dead_tokens": dead_token_share(code)}
            active.append((code != 0).flatten(0, 1).any(dim=0))
        measured.append(values | layer.tokenwise.measures(read) | layer.mixer.measures(w))
        z = layer.update(z, w)
    stacked: Measures = {}
    for name, first in measured[0].items():
        whole = isinstance(first, Tensor)
        stacked[name] = torch.stack([_tensor(one[name]) for one in measured]).double().cpu() if whole else first
    return stacked, torch.stack(active).cpu() if active else None


def _rates(layer: Layer, reads: Tensor, w: Tensor, compressed: Tensor) -> Measures:
    """Returns the coding rates of a layer, whose mixer reads tokens (b, n, d) and makes `compressed` of them."""
    tokens = coding_rate(reads[:, None])
    before = layer.mixer.coordinates(w)
    after = layer.mixer.coordinates(layer.project(compressed))
    if before is None or after is None:
        name = type(layer.mixer).__name__
        return {"token_coding_rate": tokens} | dict.fromkeys(_OF_SUBSPACES, f"{name} {layer.mixer.no_subspaces}")
    rate = coding_rate(before)
    return {
        "coding_rate": rate,
        "coding_rate_change": coding_rate(after) - rate,
        "token_coding_rate": tokens,
    }


def _tensor(value: Tensor | str) -> Tensor:
    assert isinstance(value, Tensor), f"one layer has a measure and another says: {value}"
    return value
