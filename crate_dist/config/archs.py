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
    in_bias, out_bias: whether the mixer's first map has a bias, of the mixers that may have one, and its output
    layer_scale: first value of γ, which scales branches; 0: no γ
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
    in_bias: bool = True
    out_bias: bool = True
    layer_scale: float = 0.0
    init: str = "parts"


def _cbt(dim: int, depth: int, heads: int) -> Arch:
    """CBT (arXiv 2509.16875): CRATE's layer with CBSA in it, and ToST's stem."""
    return Arch(dim=dim, depth=depth, heads=heads, stem="convolutions", mixer="cbsa")


def _tost(dim: int, depth: int, heads: int) -> Arch:
    """Returns a ToST (arXiv 2412.17810): TSSA and MLP, whose class token comes behind the layers."""
    return Arch(
        dim=dim,
        depth=depth,
        heads=heads,
        stem="convolutions",
        positions="fourier",
        class_token=False,
        mixer="tssa",
        tokenwise="mlp",
        residual="pre_norm",
        head="class_attention",
        norm_eps=1e-6,
        head_norm_eps=1e-6,
        layer_scale=1.0 if depth < 24 else 1e-5,
        init="tost",
    )


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
    "cbt_tiny": _cbt(192, 12, 3),  # 1.79 M
    "cbt_small": _cbt(384, 12, 6),  # 6.67 M
    "cbt_base": _cbt(768, 12, 12),  # 25.69 M
    "cbt_large": _cbt(1024, 24, 16),  # 83.05 M
    "cbsa_crate_tiny": replace(_cbt(192, 12, 3), mixer="mssa"),  # 1.79 M
    "cbsa_crate_small": replace(_cbt(384, 12, 6), mixer="mssa"),  # 6.67 M
    "cbsa_tost_tiny": replace(_cbt(192, 12, 3), mixer="tssa", in_bias=False),  # 1.79 M
    "cbsa_tost_small": replace(_cbt(384, 12, 6), mixer="tssa", in_bias=False),  # 6.67 M
    "tost_tiny_12": _tost(192, 12, 4),  # 5.77 M
    "tost_small_12": _tost(384, 12, 8),  # 22.59 M
    "tost_tiny_24": _tost(192, 24, 4),  # 10.22 M
    "tost_small_24": _tost(384, 24, 8),  # 40.34 M
    "tost_medium_24": _tost(512, 24, 8),  # 71.48 M
    "tost_large_24": _tost(768, 24, 16),  # 160.3 M
    "crate_alpha_base": _ALPHA_BASE,  # 72.33 M
    "crate_alpha_large": replace(_ALPHA_BASE, dim=1024, depth=24, heads=16),  # 253.65 M at patch 14
    "crate_alpha_huge": replace(_ALPHA_BASE, dim=1280, depth=32, heads=16),  # 526.82 M at patch 14
    "vit_tiny": _VIT_TINY,  # 5.72 M
    "vit_small": replace(_VIT_TINY, dim=384, heads=6),  # 22.05 M
}
