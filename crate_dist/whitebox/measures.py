"""Measures the white box, layer by layer: compression, sparsity, and what each part of the layer says of itself.

Of every layer: the coding rate of the tokens that its mixer reads, and where the mixer has subspaces, that in them, and
what the mixer makes of it (models/rates.py has the definitions). Of a token-wise part that makes a sparse code, ISTA
its output, the share of exact zeros among its entries; the paper's figures show its complement, ‖Z‖₀ / (d n). Whatever
else `measures` of the mixer and of the token-wise part return, by name. What a model does not have, and what its parts
do not measure, is told, not made up.

Shapes: L layers, b images, n tokens, d features, h heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from crate_dist.errors import UserError
from crate_dist.models.rates import Measures, coding_rate, dead_token_share, zero_share
from crate_dist.models.residuals.layer import Layer
from crate_dist.models.transformer import Transformer

_OF_SUBSPACES = ("coding_rate", "coding_rate_change", "subspace_coherence", "orthonormality_error", "out_alignment")
_OF_CODES = ("zeros", "dead_tokens", "dead_features", "coherence")
_GRADIENT = "gradient_norm"


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
    Raises UserError: what a part measures is no number of each image or of each image and head, or has a name that
    something else has.
    """
    with evaluating(model):
        parts = [_profile(model, images) for images in batches]
    layers = [layer for layer in model.layers if isinstance(layer, Layer)]
    values, missing = dict[str, Tensor](), dict[str, str]()
    for name, first in parts[0].items():
        if isinstance(first, str):
            missing[name] = first
        elif name == "dead_features":
            values[name] = 1 - torch.stack([_tensor(name, measured) for measured in parts]).amax(dim=0).mean(dim=1)
        elif first.ndim > 1:
            values[name] = torch.cat([_tensor(name, measured) for measured in parts], dim=1)
        else:
            values[name] = first
    return Profile(values, missing, type(layers[0].mixer).__name__, type(layers[0].tokenwise).__name__)


def layer_gradient_norms(model: Transformer, images: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Returns ‖∂ loss / ∂ θ_ℓ‖₂ over the parameters of each layer ℓ, fp64 (L,), of the mean cross-entropy on images.

    A backward pass of its own: parameters' .grad are neither read nor written, and no hook on them runs. What is not
    trained or has no part in the loss adds nothing.
    images: (b, 3, image_size, image_size); labels: int64 (b,)
    """
    layers = [[p for p in layer.parameters() if p.requires_grad] for layer in model.layers]
    with evaluating(model), torch.enable_grad():
        loss = F.cross_entropy(model(images).float(), labels, label_smoothing=label_smoothing)
        gradients = torch.autograd.grad(loss, list(chain(*layers)), allow_unused=True)
    nothing = torch.zeros((), dtype=torch.float64, device=loss.device)
    squares = torch.stack([nothing if g is None else g.double().square().sum() for g in gradients])
    return torch.stack([part.sum() for part in squares.split([*map(len, layers)])]).sqrt().cpu()


@contextmanager
def evaluating(model: Transformer) -> Iterator[None]:
    """Turns training off, dropout with it, and back to what it was afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _profile(model: Transformer, images: Tensor) -> Measures:
    """Returns the measures of all layers, (L, …) each; "dead_features": 1 for features that a code uses, (L, m)."""
    z = model.embed_any_size(images)
    measured: list[Measures] = []
    for layer in model.layers:
        assert isinstance(layer, Layer)
        reads = layer.norms[0](z)
        w = layer.mixer.project(reads)
        compressed = layer.compress(z, w)
        measured.append(_of_parts(layer, w, layer.reads(compressed), _rates(layer, reads, w, compressed)))
        z = layer.update(z, w)
    return {
        name: torch.stack([_tensor(name, one) for one in measured]).double().cpu()
        if isinstance(first, Tensor)
        else first
        for name, first in measured[0].items()
    }


def _rates(layer: Layer, reads: Tensor, w: Tensor, compressed: Tensor) -> Measures:
    """Returns the coding rates of a layer, whose mixer reads tokens (b, n, d) and makes `compressed` of them."""
    tokens = coding_rate(reads[:, None])
    before = layer.mixer.coordinates(w)
    after = layer.mixer.coordinates(layer.project(compressed))
    if before is None or after is None:
        return {"token_coding_rate": tokens}
    rate = coding_rate(before)
    return {
        "coding_rate": rate,
        "coding_rate_change": coding_rate(after) - rate,
        "token_coding_rate": tokens,
    }


def _of_parts(layer: Layer, w: Tensor, read: Tensor, rates: Measures) -> Measures:
    """Returns the rates of a layer, and what its parts measure of what they read; why, where they measure nothing.

    Raises UserError: for no such measure, or when two have the same name.
    """
    merged, tokenwise, mixer = dict(rates), type(layer.tokenwise).__name__, type(layer.mixer).__name__
    code = layer.tokenwise.code(read)
    if code is not None:
        used = (code != 0).flatten(0, 1).any(dim=0)
        merged |= {"zeros": zero_share(code), "dead_tokens": dead_token_share(code), "dead_features": used}
    by = dict.fromkeys((*merged, _GRADIENT), "the white box, of every layer")
    for part, found in ((tokenwise, layer.tokenwise.measures(read)), (mixer, layer.mixer.measures(w))):
        for name, value in found.items():
            if name in by:
                raise UserError(
                    f'"{name}" is measured by {part} and by {by[name]}, and one would replace the other: give it '
                    f"another name in the `measures` of {part}"
                )
            by[name] = part
            merged[name] = _number(f'"{name}", which {part} measures,', value, len(read))
    no_subspaces = layer.mixer.no_subspaces if "coding_rate" not in rates else "does not measure it"
    no_code = layer.tokenwise.no_code if code is None else "does not measure it"
    absent = dict.fromkeys(_OF_SUBSPACES, f"{mixer} {no_subspaces}") | dict.fromkeys(
        _OF_CODES, f"{tokenwise} {no_code}"
    )
    return merged | {name: why for name, why in absent.items() if name not in merged}


def _number(what: str, value: object, images: int) -> Tensor | str:
    """Returns a measure of so many images as a tensor, or the text that it is. Raises UserError: it is neither."""
    if isinstance(value, int | float):
        value = torch.tensor(float(value))
    if isinstance(value, str):
        return value
    if isinstance(value, Tensor) and (value.ndim == 0 or (value.ndim < 3 and len(value) == images)):
        return value
    shape = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise UserError(
        f"{what} is {shape}: a measure is one number of each image, ({images},) here, of each image and head, "
        f"({images}, h), or one alone, or a text that says why there is none"
    )


def _tensor(name: str, measured: Measures) -> Tensor:
    value = measured.get(name, "it is not measured")
    if isinstance(value, str):
        raise UserError(f'"{name}" is measured of some layers or images, and of others not: {value}')
    return value
