"""The named architectures: each a row of numbers, and of the parts that a model is made of. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Arch:
    """A model without its images and classes; the parts are the names in config/parts.py.

    dim: features of a token (its width); depth: layers; heads: of the mixer, each with dim // heads features
    ratio: width of the token-wise part within to that of the tokens, where the part has one
    positions: "learned", one for each token, or "fourier", of any grid
    class_token: whether one goes through the layers, before the patches
    norm_eps, head_norm_eps: added to the variance by the layers' norms and by the head's
    out_bias: whether the mixer's output has a bias; layer_scale: first value of γ, which scales branches; 0: no γ
    init: whose first weights, by the names in config/parts.py
    """

    dim: int
    depth: int
    heads: int
    ratio: int = 4
    stem: str = "patches"
    positions: str = "learned"
    class_token: bool = True
    mixer: str = "mssa"
    tokenwise: str = "ista"
    residual: str = "crate"
    head: str = "linear"
    norm_eps: float = 1e-5
    head_norm_eps: float = 1e-5
    out_bias: bool = True
    layer_scale: float = 0.0
    init: str = "crate"


_ALPHA_BASE = Arch(
    dim=768,
    depth=12,
    heads=12,
    stem="linear",
    tokenwise="odl",
    residual="pre_norm",
    norm_eps=1e-6,
    out_bias=False,
    init="alpha",
)
_VIT_TINY = Arch(
    dim=192,
    depth=12,
    heads=3,
    stem="linear",
    mixer="attention",
    tokenwise="mlp",
    residual="pre_norm",
    head="mean_patches_twice",
    norm_eps=1e-6,
    head_norm_eps=1e-6,
    init="vit",
)

# Parameters at 224 pixels, patch 16, 1,000 classes.
ARCHS: dict[str, Arch] = {
    "crate_demo": Arch(dim=96, depth=4, heads=4),
    "crate_tiny": Arch(dim=384, depth=12, heads=6),  # 6.09 M
    "crate_small": Arch(dim=576, depth=12, heads=12),  # 13.12 M
    "crate_base": Arch(dim=768, depth=12, heads=12),  # 22.80 M
    "crate_large": Arch(dim=1024, depth=24, heads=16),  # 77.64 M
    "crate_alpha_base": _ALPHA_BASE,  # 72.33 M
    "crate_alpha_large": replace(_ALPHA_BASE, dim=1024, depth=24, heads=16),  # 253.65 M at patch 14
    "crate_alpha_huge": replace(_ALPHA_BASE, dim=1280, depth=32, heads=16),  # 526.82 M at patch 14
    "vit_tiny": _VIT_TINY,  # 5.72 M
    "vit_small": replace(_VIT_TINY, dim=384, heads=6),  # 22.05 M
}
