"""The named architectures: each a row of numbers, and of the parts that a model is made of. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from crate_dist.config.keys import nearest
from crate_dist.config.parts import OPTIONS

HALVINGS = {4: 2, 8: 3, 16: 4}
"""Convolutions of stride 2 that make a patch, by its size in pixels."""


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


def unread(arch: Arch) -> set[str]:
    """Returns the settings of a model that none of its parts reads."""
    mlp_in_head, names = arch.head == "class_attention", set[str]()
    if arch.tokenwise in ("ista", "none") and not mlp_in_head:
        names.add("ratio")
    if arch.tokenwise in ("mlp", "none"):
        names |= {"ista_step", "ista_threshold"}
    if arch.head in ("mean_patches", "mean_patches_twice", "class_attention"):
        names.add("pool")
    if arch.residual == "crate" and not mlp_in_head:
        names.add("layer_scale")
    if arch.mixer in ("mssa", "cbsa", "cbsa_aligned"):
        names.add("in_bias")
    return names


def check_mixer(arch: Arch) -> None:
    """Raises ValueError when the mixer needs a class token, and there is none in the layers."""
    if arch.mixer == "cbsa" and not arch.class_token:
        raise ValueError(
            'mixer = "cbsa", as published, needs the class token, over which its grid lies; class_token = true, or '
            'mixer = "cbsa_aligned", would do'
        )


def options_of(arch: Arch) -> dict[str, float]:
    """Returns the numbers that the parts of an architecture have of their own, with their defaults."""
    parts = (arch.stem, arch.mixer, arch.tokenwise, arch.residual, arch.head)
    return {name: default for part in parts for name, default in OPTIONS.get(part, {}).items()}


def check_options(arch: Arch, given: Mapping[str, float]) -> None:
    """Raises ValueError when no part of an architecture takes an option, or when its value is no such number."""
    known = options_of(arch)
    for name, value in given.items():
        if name not in known:
            there = f"they take {', '.join(known)}" if known else "they take none"
            raise ValueError(f"no part of this model takes options.{name}{nearest(name, known)}; {there}")
        whole = isinstance(known[name], int)
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not math.isfinite(value):
            raise ValueError(f"options.{name} is a {'whole ' * whole}number, not {value!r}")
        if whole and value < 1:
            raise ValueError(f"options.{name} is a whole number above 0, not {value!r}")


def check_patches(arch: Arch, patch_size: int) -> None:
    """Raises ValueError when the stem has no such patches, or its convolutions' widths are no whole numbers."""
    if arch.stem != "convolutions":
        return
    if patch_size not in HALVINGS:
        sizes = ", ".join(map(str, HALVINGS))
        raise ValueError(f"the stem of convolutions halves the image: patch_size is one of {sizes}, not {patch_size}")
    narrowest = 2 ** (HALVINGS[patch_size] - 1)
    if arch.dim % narrowest:
        raise ValueError(
            f"the stem's first convolution is of width {arch.dim} / {narrowest} for patches of {patch_size} pixels; "
            f"{arch.dim // narrowest * narrowest or narrowest} would divide"
        )


def differing(there: Arch, here: Arch) -> dict[str, object]:
    """Returns the settings, by flat key, with which a model `here` would have the size and the parts of one `there`.

    Options too, where both are a ModelConfig. What leaves no weights, norms' eps and first weights, is left out.
    """
    unseen = ("norm_eps", "head_norm_eps", "init")
    names = [field.name for field in fields(Arch) if field.name not in unseen]
    found = {name: getattr(there, name) for name in names if getattr(there, name) != getattr(here, name)}
    keys = {f"model.{'width' if name == 'dim' else name}": value for name, value in found.items()}
    defaults = options_of(there)
    known, own = ({**defaults, **options_of(one), **getattr(one, "options", {})} for one in (there, here))
    return keys | {f"model.options.{name}": value for name, value in known.items() if own[name] != value}


def as_set(settings: Mapping[str, object]) -> str:
    """Returns settings as a command line takes them: --set model.depth=2 --set model.out_bias=false."""
    plain = {key: str(value).lower() if isinstance(value, bool) else value for key, value in settings.items()}
    return " ".join(f"--set {key}={value}" for key, value in plain.items())
