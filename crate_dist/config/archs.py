"""The named architectures: each a row of numbers, and of the parts that a model is made of. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Arch:
    """A model without its images and classes; the parts are the names in config/parts.py.

    dim: features of a token (its width); depth: layers; heads: of the mixer, each with dim // heads features
    ratio: width of the token-wise part within to that of the tokens, where the part has one
    positions: "learned", one for each token, or "fourier", of any grid
    class_token: whether one goes through the layers, before the patches
    norm_eps, head_norm_eps: added to the variance by the layers' norms and by the head's
    out_bias: whether the mixer's output has a bias; layer_scale: first value of γ, which scales branches; 0: no γ
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


# Parameters at 224 pixels, patch 16, 1,000 classes.
ARCHS: dict[str, Arch] = {
    "crate_demo": Arch(dim=96, depth=4, heads=4),
    "crate_tiny": Arch(dim=384, depth=12, heads=6),  # 6.09 M
    "crate_small": Arch(dim=576, depth=12, heads=12),  # 13.12 M
    "crate_base": Arch(dim=768, depth=12, heads=12),  # 22.80 M
    "crate_large": Arch(dim=1024, depth=24, heads=16),  # 77.64 M
}
