"""What the parts of a model cost: parameters, operations, and what autograd keeps of them. Imports no torch.

One rule per part, which reads like the part, and is all that is known of its cost; tests hold each against what torch
counts. A part that has none, such as a new one, costs what is not known, which NotKnown says to all who ask.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from itertools import pairwise

from crate_dist.models.config import CHANNELS, ModelConfig
from crate_dist.models.sizes import halving_widths, ista_in_one_product


class NotKnown(LookupError):
    """A part of the model has no rule here."""


@dataclass(frozen=True)
class Cost:
    """What a part costs in one forward pass of a number of images. Costs add up, and repeat by a factor.

    parameters: values that are learned
    flops: of matrix products and convolutions alone, 2 per multiply-add, in the fewest that the mathematics needs: what
        is saved is not counted as work done, and so a saved product shows as a higher MFU, never as a lower one
    stream, products, single, widened, rounded: values that autograd keeps for the backward pass: in the type of the
        weights, as the tokens between parts are; in that of matrix products; in fp32 always; in fp32 where products are
        in bf16, and so a copy; of matrices that autocast rounds to bf16. Autocast is a GPU's, where norms read fp32
    tokens: values, in the type of the weights, that a token-wise part keeps of its output or a head of its input, where
        others may keep the same: the rule of the residual pattern counts them, once
    in_hand: values, in the type of the weights, that its backward pass holds at a time beside some of the tokens' size
    leaves: of flops, those of maps whose input has no gradient, as pixels have none: the backward pass has one product
        of their size, not two
    """

    parameters: int = 0
    flops: int = 0
    stream: int = 0
    products: int = 0
    single: int = 0
    widened: int = 0
    rounded: int = 0
    tokens: int = 0
    leaves: int = 0
    in_hand: int = 0

    def __add__(self, other: Cost) -> Cost:
        total = Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))
        return replace(total, in_hand=max(self.in_hand, other.in_hand))  # the one after the other

    def __mul__(self, times: int) -> Cost:
        return replace(Cost(*(times * value for value in astuple(self))), in_hand=self.in_hand)

    def kept_bytes(self, precision: str) -> int:
        """Counts the bytes that autograd keeps. precision: "fp32", "bf16" or "autocast", as in [train]"""
        sizes = {"fp32": (4, 4, 4, 0, 0), "bf16": (2, 2, 4, 4, 0), "autocast": (4, 2, 4, 4, 2)}[precision]
        values = (self.stream, self.products, self.single, self.widened, self.rounded)
        return sum(size * count for size, count in zip(sizes, values, strict=True))


Rule = Callable[[ModelConfig, int], Cost]
"""The cost of a part in a model, for a number of images."""


def costs(config: ModelConfig, images: int) -> dict[str, Cost]:
    """Returns the cost of each part in a forward pass of `images` images; of a layer's parts, in all layers together.

    By name: "stem" (with class token and positions), "mixer", "tokenwise", "residual" (the layers' norms and scales,
    and the tokens between their parts) and "head". Raises NotKnown.
    """
    return {
        "stem": _cost("stem", config, images) + _cost("positions", config, images),
        "mixer": _cost("mixer", config, images) * config.depth,
        "tokenwise": _cost("tokenwise", config, images) * config.depth,
        "residual": _cost("residual", config, images),
        "head": _cost("head", config, images),
    }


def parameters(config: ModelConfig) -> int:
    """Counts the parameters of a model. Raises NotKnown."""
    return sum(cost.parameters for cost in costs(config, 1).values())


def least_parameters(config: ModelConfig) -> int:
    """Counts the parameters of the parts that have a rule: of all, or fewer than the model has."""
    found = 0
    for part, of_each in RULES.items():
        if getattr(config, part) in of_each:
            with suppress(NotKnown):  # the pattern's rule asks the parts
                times = config.depth if part in ("mixer", "tokenwise") else 1
                found += times * _cost(part, config, 1).parameters
    return found


def forward_flops(config: ModelConfig, images: int) -> int:
    """Counts the operations of one forward pass of `images` images. Raises NotKnown."""
    return sum(cost.flops for cost in costs(config, images).values())


def step_flops(config: ModelConfig, images: int) -> int:
    """Counts the operations of a forward and a backward pass of `images` images; what is computed again counts once.

    The backward pass of a product has two of its size: three times the forward pass, less one of each map whose input
    has no gradient. Raises NotKnown.
    """
    return sum(3 * cost.flops - cost.leaves for cost in costs(config, images).values())


def in_hand(config: ModelConfig, images: int) -> int:
    """Counts the values that the backward pass holds at a time within a part, at the most. Raises NotKnown."""
    return max(cost.in_hand for cost in costs(config, images).values())


def kept_bytes(config: ModelConfig, images: int, precision: str, recompute: int = 0) -> int:
    """Counts the bytes that autograd keeps of `images` images from the forward pass to the backward pass.

    precision, recompute: as in [train]. Dropout's masks are not counted. Raises NotKnown.
    """
    kept = {part: cost.kept_bytes(precision) for part, cost in costs(config, images).items()}
    again = min(recompute, config.depth)
    layers = sum(kept[part] for part in ("mixer", "tokenwise", "residual"))
    between = Cost(stream=_values(config, images)).kept_bytes(precision)  # a layer that is computed again keeps these
    return kept["stem"] + kept["head"] + layers * (config.depth - again) // config.depth + again * between


def _cost(part: str, config: ModelConfig, images: int) -> Cost:
    if (name := getattr(config, part)) not in RULES[part]:
        raise NotKnown(f"what {part} = {name!r} costs is not known: it has no rule in models/costs.py")
    return RULES[part][name](config, images)


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
    norms = Cost(2 * values + 2 * c.dim, stream=patches * (values + c.dim), single=4 * patches)
    return _product(patches, values, c.dim, bias=True) + norms


def _linear_stem(c: ModelConfig, images: int) -> Cost:
    product = _product(images * c.num_patches, CHANNELS * c.patch_size**2, c.dim, bias=True)
    return product + Cost(leaves=product.flops)


def _convolutions(c: ModelConfig, images: int) -> Cost:
    total, side = Cost(products=images * CHANNELS * c.image_size**2), c.image_size
    for before, after in pairwise((CHANNELS, *halving_widths(c.dim, c.patch_size))):
        side //= 2
        out, weights = images * side**2 * after, 9 * before * after
        flops = 18 * out * before
        # Kept: what batch norm reads; but for the last, also what GELU reads and the next convolution.
        kept = out * (1 if after == c.dim else 3)
        leaves = flops if side == c.image_size // 2 else 0
        total += Cost(weights + 2 * after, flops, products=kept, rounded=weights, leaves=leaves)
    return total


def _learned(c: ModelConfig, images: int) -> Cost:
    return Cost((c.num_tokens + c.class_token) * c.dim)


def _fourier(c: ModelConfig, images: int) -> Cost:
    product = _product(c.num_patches, 64, c.dim, bias=True)  # of one grid, for all images
    return product + Cost(c.class_token * c.dim, leaves=product.flops)


def _mssa(c: ModelConfig, images: int) -> Cost:
    tokens, d = _tokens(c, images), c.dim
    attention = Cost(flops=4 * tokens * c.num_tokens * d, products=tokens * d, single=tokens * c.heads)
    out = _product(tokens, d, d, bias=c.out_bias) if c.heads > 1 else Cost(products=tokens * d)
    return _product(tokens, d, d) + attention + out


def _attention(c: ModelConfig, images: int) -> Cost:
    tokens, d = _tokens(c, images), c.dim
    attention = Cost(flops=4 * tokens * c.num_tokens * d, products=3 * tokens * d, single=tokens * c.heads)
    return _product(tokens, d, 3 * d, bias=c.in_bias) + attention + _product(tokens, d, d, bias=c.out_bias)


def _tssa(c: ModelConfig, images: int) -> Cost:
    tokens, d = _tokens(c, images), c.dim
    # w, and what it is multiplied by; w and its squares in fp32; of each head: Π, and four steps to it and to the gate.
    statistics = Cost(c.heads, products=2 * tokens * d, single=tokens * d + 4 * tokens * c.heads, widened=tokens * d)
    return _product(tokens, d, d, bias=c.in_bias) + statistics + _product(tokens, d, d, bias=c.out_bias)


def _cbsa(c: ModelConfig, images: int) -> Cost:
    tokens, d, r = _tokens(c, images), c.dim, int(c.option("cells")) ** 2
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
    out = Cost(tokens=tokens * d)  # ReLU keeps what it returns
    if ista_in_one_product(tokens, d):
        return _product(tokens, d, d) + Cost(flops=2 * d**3, products=d * d, rounded=d * d) + out
    return _product(tokens, d, d) * 2 + Cost(-d * d) + out


def _odl(c: ModelConfig, images: int, dictionaries: int = 2) -> Cost:
    tokens, d, atoms = _tokens(c, images), c.dim, round(c.ratio * c.dim)
    there, back = _product(tokens, d, atoms), _product(tokens, atoms, d)
    return (there + back) * 2 + Cost((dictionaries - 4) * d * atoms, in_hand=4 * tokens * atoms)


def _coupled_odl(c: ModelConfig, images: int) -> Cost:
    return _odl(c, images, dictionaries=1)


def _mlp(c: ModelConfig, images: int) -> Cost:
    tokens, d, hidden = _tokens(c, images), c.dim, round(c.ratio * c.dim)
    gelu = Cost(products=tokens * hidden, in_hand=2 * tokens * hidden)
    return _product(tokens, d, hidden, bias=True) + gelu + _product(tokens, hidden, d, bias=True)


def _nothing(c: ModelConfig, images: int) -> Cost:
    return Cost()


def _crate(c: ModelConfig, images: int) -> Cost:
    # The norms read a layer's input and the sum. An output that its part keeps is, but for the last, the next input.
    last = max(_cost(part, c, images).tokens for part in ("tokenwise", "head"))
    return _norms(c, images) + Cost(stream=_branches(c) * c.depth * _values(c, images) + last)


def _pre_norm(c: ModelConfig, images: int) -> Cost:
    scaled = c.layer_scale > 0  # the gradient of γ needs the branch
    output = 0 if scaled else _cost("tokenwise", c, images).tokens
    kept = ((1 + scaled) * _branches(c) * _values(c, images) + output) * c.depth + _cost("head", c, images).tokens
    return _norms(c, images) + Cost(_branches(c) * c.dim * scaled * c.depth, stream=kept)


def _norms(c: ModelConfig, images: int) -> Cost:
    return Cost(2 * c.dim, single=2 * _tokens(c, images)) * _branches(c) * c.depth


def _branches(c: ModelConfig) -> int:
    """Counts the parts of a layer, each with a norm before it."""
    return 1 if c.tokenwise == "none" else 2


def _pooled_head(c: ModelConfig, images: int) -> Cost:
    # A view of the class tokens is one of all tokens.
    return _linear_head(c, images) + Cost(tokens=_values(c, images) if c.pool == "cls" else 0)


def _linear_head(c: ModelConfig, images: int) -> Cost:
    return _product(images, c.dim, c.num_classes, bias=True) + Cost(2 * c.dim, stream=images * c.dim)


def _class_attention(c: ModelConfig, images: int) -> Cost:
    d, tokens, hidden, scaled = c.dim, images * (c.num_patches + 1), round(c.ratio * c.dim), c.layer_scale > 0
    # Products of the class token alone but for two, of its looks: one with each head, for keys and for values.
    looks = Cost(flops=4 * tokens * c.heads * d, products=tokens * (d + c.heads), single=tokens * (c.heads + 2))
    attention = looks + _product(images, d, d, bias=True) * 4
    mlp = _product(images, d, hidden, bias=True) + _product(images, hidden, d, bias=True)
    block = attention + mlp + Cost(4 * d + 2 * d * scaled, stream=tokens * d)
    # Patches change in the first block alone; MLP keeps a view of all tokens where it reads the class token.
    patches = Cost(stream=(2 + scaled) * tokens * d, single=2 * tokens)
    return block * 2 + patches + _linear_head(c, images) + Cost(d)


RULES: dict[str, dict[str, Rule]] = {
    "stem": {"patches": _patches, "linear": _linear_stem, "convolutions": _convolutions},
    "positions": {"learned": _learned, "fourier": _fourier},
    "mixer": {"mssa": _mssa, "tssa": _tssa, "cbsa": _cbsa, "cbsa_aligned": _cbsa, "attention": _attention},
    "tokenwise": {"ista": _ista, "odl": _odl, "odl_coupled": _coupled_odl, "mlp": _mlp, "none": _nothing},
    "residual": {"crate": _crate, "pre_norm": _pre_norm},
    "head": {
        "linear": _pooled_head,
        "mean_patches": _linear_head,
        "mean_patches_twice": _linear_head,
        "class_attention": _class_attention,
    },
}
"""Key of [model] -> name of a part, as in config/parts.py -> its rule."""
