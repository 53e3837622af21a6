"""The parts of a model: a row for each, by its name in a recipe. Imports no torch.

A new operator is a file and a row here; docs/hacking.md adds one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Option:
    """A number of a part's own. A whole default asks for whole numbers above 0, any other for finite ones.

    above: what it has to be above; to: the most that it may be
    """

    default: float
    above: float = -math.inf
    to: float = math.inf


@dataclass(frozen=True)
class Part:
    """What is to be known of a part without torch.

    path: its class, below crate_dist.models
    reads: settings of [model] that it reads and not every part of its kind does; a recipe may not give what no part
    reads
    options: numbers of its own, with their defaults, for [model.options]; the part has them by config.option(name)
    class_token: whether the layers are to have one, or to have none; None: as they like
    patches: their sizes in pixels, each with what it has the width be a multiple of; {}: any size and width
    batch_norm: whether it takes statistics over train.group images
    """

    path: str
    reads: Set[str] = frozenset()
    options: Mapping[str, float | Option] = field(default_factory=dict)
    class_token: bool | None = None
    patches: Mapping[int, int] = field(default_factory=dict)
    batch_norm: bool = False


STEMS = {
    "patches": Part("stems.patches.PatchEmbedding"),  # CRATE: LayerNorm, Linear, LayerNorm
    "convolutions": Part(  # ToST, CBT: 3 x 3 of stride 2, GELU; the first has the width over the number beside the size
        "stems.convolutions.ConvolutionStem", patches={4: 2, 8: 4, 16: 8}, batch_norm=True
    ),
    "linear": Part("stems.linear.LinearStem"),  # CRATE-α, ViT: one map with a bias, which is a convolution
}

MIXERS = {
    "mssa": Part("mixers.mssa.MSSA", reads={"dropout", "out_bias"}),  # CRATE
    "tssa": Part("mixers.tssa.TSSA", reads={"dropout", "in_bias", "out_bias"}),  # ToST
    "cbsa": Part(  # CBT; cells: rows and columns of its grid of representatives, shifted by one, as published
        "mixers.cbsa.CBSA", reads={"dropout", "out_bias"}, options={"cells": 8}, class_token=True
    ),
    "cbsa_aligned": Part(  # the same with the grid in its place
        "mixers.cbsa.AlignedCBSA", reads={"dropout", "out_bias"}, options={"cells": 8}
    ),
    "attention": Part("mixers.attention.Attention", reads={"dropout", "in_bias", "out_bias"}),  # ViT
}

TOKENWISE = {
    "ista": Part("tokenwise.ista.ISTA", reads={"ista_step", "ista_threshold"}),  # CRATE
    "odl": Part("tokenwise.odl.ODL", reads={"ratio", "ista_step", "ista_threshold"}),  # CRATE-α
    "odl_coupled": Part(  # the same before its dictionaries are decoupled
        "tokenwise.odl.CoupledODL", reads={"ratio", "ista_step", "ista_threshold"}
    ),
    "mlp": Part("tokenwise.mlp.MLP", reads={"ratio"}),  # ViT, ToST
    "none": Part("tokenwise.none.NoTokenWise"),  # a layer of its mixer alone
}

RESIDUALS = {
    "crate": Part("residuals.crate.CrateLayer"),  # z = f(LN(z + m(LN z)))
    "pre_norm": Part("residuals.pre_norm.PreNormLayer", reads={"layer_scale"}),  # z += m(LN z); z += f(LN z)
}

HEADS = {
    "linear": Part(  # LayerNorm and Linear of the class token, or of the tokens' mean
        "heads.linear.LinearHead", reads={"head_norm_eps", "pool"}
    ),
    "class_attention": Part(  # ToST: a class token of its own, which reads the patches
        "heads.class_attention.ClassAttentionHead",
        reads={"head_norm_eps", "ratio", "dropout", "layer_scale"},
        class_token=False,
    ),
    "mean_patches": Part("heads.mean_patches.MeanPatches", reads={"head_norm_eps"}),  # of the patches' mean
    "mean_patches_twice": Part(  # its norm applied twice, as CRATE's code does to ViT
        "heads.mean_patches.MeanPatchesTwice", reads={"head_norm_eps"}
    ),
}

PARTS = {"stem": STEMS, "mixer": MIXERS, "tokenwise": TOKENWISE, "residual": RESIDUALS, "head": HEADS}
"""Key of [model] -> its parts."""

INITS = {
    "parts": Part("initial.leave"),  # as each part draws its own: CRATE, CBT
    "alpha": Part("initial.draw_alpha"),  # as CRATE-α's training code
    "vit": Part("initial.draw_vit"),  # as timm for its ViT
    "tost": Part("initial.draw_tost"),  # as ToST's code
}
"""Whose first weights; here a row's path is a function's."""
