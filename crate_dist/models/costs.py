"""What the parts of a model cost: parameters, operations, and what autograd keeps of them. Imports no torch.

One rule per part, which reads like the part; tests hold each against what torch counts. A part that has none, such as
a new one, costs what is not known, which NotKnown says to all who ask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import Final

from crate_dist.models.config import CHANNELS, ModelConfig
from crate_dist.models.sizes import ista_in_one_product

REPRESENTATIVES: Final = 64
"""Of CBSA, in each head."""


class NotKnown(LookupError):
    """A part of the model has no rule here."""


@dataclass(frozen=True)
class Cost:
    """What a part costs in one forward pass of a number of images. Costs add up, and repeat by a factor.

    parameters: values that are learned
    flops: of matrix products and convolutions alone, 2 per multiply-add, in the fewest that the mathematics needs: what
        is saved is not counted as work done, and so a saved product shows as a higher MFU, never as a lower one. A
        backward pass counts twice its forward pass; what is computed again counts once
    stream, products, single, rounded: values that autograd keeps for the backward pass: in the type of the weights (the
        tokens between parts); in that of matrix products; in fp32 always; of the matrices that autocast rounds to bf16
    """

    parameters: int = 0
    flops: int = 0
    stream: int = 0
    products: int = 0
    single: int = 0
    rounded: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: int) -> Cost:
        return Cost(*(times * value for value in astuple(self)))

    def kept_bytes(self, precision: str) -> int:
        """Counts the bytes that autograd keeps. precision: "fp32", "bf16" or "autocast", as in [train]"""
        stream, products, rounded = {"fp32": (4, 4, 0), "bf16": (2, 2, 0), "autocast": (4, 2, 2)}[precision]
        return stream * self.stream + products * self.products + 4 * self.single + rounded * self.rounded


Rule = Callable[[ModelConfig, int], Cost]
"""The cost of a part in a model, for a number of images."""


def costs(config: ModelConfig, images: int) -> dict[str, Cost]:
    """Returns the cost of each part in a forward pass of `images` images; of a layer's parts, in all layers together.

    By name: "stem" (with class token and positions), "mixer", "tokenwise", "residual" (the layers' norms and scales,
    and the tokens between their parts) and "head". Raises NotKnown.
    """
    stem = _rule("stem", config.stem)(config, images) + _rule("positions", config.positions)(config, images)
    layers = {part: _rule(part, getattr(config, part)) for part in ("mixer", "tokenwise", "residual")}
    return {
        "stem": stem,
        **{part: rule(config, images) * config.depth for part, rule in layers.items()},
        "head": _rule("head", config.head)(config, images),
    }


def parameters(config: ModelConfig) -> int:
    """Counts the parameters of a model. Raises NotKnown."""
    return sum(cost.parameters for cost in costs(config, 1).values())


def forward_flops(config: ModelConfig, images: int) -> int:
    """Counts the operations of one forward pass of `images` images; with its backward pass, three times that.

    Raises NotKnown.
    """
    return sum(cost.flops for cost in costs(config, images).values())


def kept_bytes(config: ModelConfig, images: int, precision: str, recompute: int = 0) -> int:
    """Counts the bytes that autograd keeps of `images` images from the forward pass to the backward pass.

    precision, recompute: as in [train]. Dropout's masks are not counted. Raises NotKnown.
    """
    kept = {part: cost.kept_bytes(precision) for part, cost in costs(config, images).items()}
    again = min(recompute, config.depth)
    layers = sum(kept[part] for part in ("mixer", "tokenwise", "residual"))
    between = Cost(stream=_values(config, images)).kept_bytes(precision)  # a layer that is computed again keeps these
    return kept["stem"] + kept["head"] + layers * (config.depth - again) // config.depth + again * between


def _rule(part: str, name: str) -> Rule:
    if name not in RULES[part]:
        raise NotKnown(f"what {part} = {name!r} costs is not known: it has no rule in models/costs.py")
    return RULES[part][name]


def _tokens(c: ModelConfig, images: int) -> int:
    return images * c.num_tokens


def _values(c: ModelConfig, images: int) -> int:
    """Counts the values of all tokens."""
    return _tokens(c, images) * c.dim


def _product(tokens: int, d_in: int, d_out: int, *, bias: bool = False) -> Cost:
    """Counts a linear map, which keeps its input."""
    matrix = d_in * d_out
    return Cost(matrix + bias * d_out, 2 * tokens * matrix, products=tokens * d_in, rounded=matrix)


def _patches(c: ModelConfig, images: int) -> Cost:
    patches, values = images * c.num_patches, CHANNELS * c.patch_size**2
    norms = Cost(2 * values + 2 * c.dim, stream=patches * values, single=patches * (c.dim + 4))
    return _product(patches, values, c.dim, bias=True) + norms


def _linear_stem(c: ModelConfig, images: int) -> Cost:
    return _product(images * c.num_patches, CHANNELS * c.patch_size**2, c.dim, bias=True)


def _convolutions(c: ModelConfig, images: int) -> Cost:
    halvings = c.patch_size.bit_length() - 1
    widths = [CHANNELS, *(c.dim >> (halvings - number) for number in range(1, halvings + 1))]
    total, side = Cost(products=images * CHANNELS * c.image_size**2), c.image_size
    for number, (before, after) in enumerate(pairwise(widths), 1):
        side //= 2
        out, weights = images * side**2 * after, 9 * before * after
        # Kept: what batch norm reads; but for the last, also what GELU reads and the next convolution.
        total += Cost(weights + 2 * after, 18 * out * before, products=out * (1 if number == halvings else 3))
        total += Cost(rounded=weights)
    return total


def _learned(c: ModelConfig, images: int) -> Cost:
    return Cost((c.num_tokens + c.class_token) * c.dim, stream=_values(c, images))


def _mssa(c: ModelConfig, images: int) -> Cost:
    tokens, d = _tokens(c, images), c.dim
    attention = Cost(flops=4 * tokens * c.num_tokens * d, products=tokens * d, single=tokens * c.heads)
    out = _product(tokens, d, d, bias=c.out_bias) if c.heads > 1 else Cost(products=tokens * d)
    return _product(tokens, d, d) + attention + out


def _attention(c: ModelConfig, images: int) -> Cost:
    tokens, d = _tokens(c, images), c.dim
    attention = Cost(flops=4 * tokens * c.num_tokens * d, products=3 * tokens * d, single=tokens * c.heads)
    return _product(tokens, d, 3 * d, bias=True) + attention + _product(tokens, d, d, bias=c.out_bias)


def _cbsa(c: ModelConfig, images: int) -> Cost:
    tokens, d, r = _tokens(c, images), c.dim, REPRESENTATIVES
    # w; A; of the representatives: scaled, moved and contracted ones, what they attend to and that scaled.
    operator = Cost(
        2 * c.heads,
        3 * 2 * tokens * r * d + images * 4 * r * r * d,
        stream=images * r * d,
        products=tokens * d + tokens * r * c.heads + 4 * images * r * d,
        single=images * r * c.heads,
    )
    return _product(tokens, d, d) + operator + _product(tokens, d, d, bias=c.out_bias)


def _ista(c: ModelConfig, images: int) -> Cost:
    tokens, d = _tokens(c, images), c.dim
    output = Cost(stream=tokens * d)  # of which ReLU's backward pass sees the sign
    if ista_in_one_product(tokens, d):
        return _product(tokens, d, d) + output + Cost(flops=2 * d**3, products=d * d, rounded=d * d)
    return _product(tokens, d, d) * 2 + output + Cost(-d * d)


def _odl(c: ModelConfig, images: int, dictionaries: int = 2) -> Cost:
    tokens, d, atoms = _tokens(c, images), c.dim, round(c.ratio * c.dim)
    there, back = _product(tokens, d, atoms), _product(tokens, atoms, d)
    return (there + back) * 2 + Cost((dictionaries - 4) * d * atoms)


def _coupled_odl(c: ModelConfig, images: int) -> Cost:
    return _odl(c, images, dictionaries=1)


def _mlp(c: ModelConfig, images: int) -> Cost:
    tokens, d, hidden = _tokens(c, images), c.dim, round(c.ratio * c.dim)
    gelu = Cost(products=tokens * hidden)
    return _product(tokens, d, hidden, bias=True) + gelu + _product(tokens, hidden, d, bias=True)


def _norms(c: ModelConfig, images: int) -> Cost:
    return Cost(4 * c.dim, single=4 * _tokens(c, images))


def _crate(c: ModelConfig, images: int) -> Cost:
    # What the second norm reads; what the next layer reads is kept by ISTA as its output, and by others not.
    between = 1 if c.tokenwise == "ista" else 2
    return _norms(c, images) + Cost(stream=between * _values(c, images))


def _pre_norm(c: ModelConfig, images: int) -> Cost:
    scaled = c.layer_scale > 0  # the gradient of γ needs the branch
    return _norms(c, images) + Cost(2 * c.dim * scaled, stream=(4 if scaled else 2) * _values(c, images))


def _linear_head(c: ModelConfig, images: int) -> Cost:
    return _product(images, c.dim, c.num_classes, bias=True) + Cost(2 * c.dim, stream=images * c.dim)


RULES: dict[str, dict[str, Rule]] = {
    "stem": {"patches": _patches, "linear": _linear_stem, "convolutions": _convolutions},
    "positions": {"learned": _learned},
    "mixer": {"mssa": _mssa, "attention": _attention, "cbsa": _cbsa, "cbsa_aligned": _cbsa},
    "tokenwise": {"ista": _ista, "odl": _odl, "odl_coupled": _coupled_odl, "mlp": _mlp},
    "residual": {"crate": _crate, "pre_norm": _pre_norm},
    "head": {"linear": _linear_head, "mean_patches": _linear_head, "mean_patches_twice": _linear_head},
}
"""Key of [model] -> name of a part, as in config/parts.py -> its rule."""
