"""The parts of a model: the name of each in a recipe, and its class below crate_dist.models. Imports no torch.

A new operator is a file and a row here; docs/hacking.md adds one.
"""

from __future__ import annotations

STEMS = {
    "patches": "stems.patches.PatchEmbedding",  # CRATE: LayerNorm, Linear, LayerNorm
    "convolutions": "stems.convolutions.ConvolutionStem",  # ToST, CBT: 3 x 3 of stride 2, batch norm, GELU
    "linear": "stems.linear.LinearStem",  # CRATE-α, ViT: one map with a bias, which is a convolution
}

MIXERS = {
    "mssa": "mixers.mssa.MSSA",  # CRATE
    "tssa": "mixers.tssa.TSSA",  # ToST
    "cbsa": "mixers.cbsa.CBSA",  # CBT, its grid of patches shifted by one, as published
    "cbsa_aligned": "mixers.cbsa.AlignedCBSA",  # the same with the grid in its place
    "attention": "mixers.attention.Attention",  # ViT
}

TOKENWISE = {
    "ista": "tokenwise.ista.ISTA",  # CRATE
    "odl": "tokenwise.odl.ODL",  # CRATE-α
    "odl_coupled": "tokenwise.odl.CoupledODL",  # the same before its dictionaries are decoupled
    "mlp": "tokenwise.mlp.MLP",  # ViT, ToST
    "none": "tokenwise.none.NoTokenWise",  # a layer of its mixer alone
}

RESIDUALS = {
    "crate": "residuals.crate.CrateLayer",  # z = f(LN(z + m(LN z)))
    "pre_norm": "residuals.pre_norm.PreNormLayer",  # z += m(LN z); z += f(LN z)
}

HEADS = {
    "linear": "heads.linear.LinearHead",  # LayerNorm and Linear of the class token, or of the tokens' mean
    "class_attention": "heads.class_attention.ClassAttentionHead",  # ToST: a class token that reads the patches
    "mean_patches": "heads.mean_patches.MeanPatches",  # LayerNorm and Linear of the patches' mean
    "mean_patches_twice": "heads.mean_patches.MeanPatchesTwice",  # its norm applied twice, as CRATE's code does to ViT
}

OPTIONS: dict[str, dict[str, float]] = {
    "cbsa": {"cells": 8},  # rows and columns of the grid of representatives, which are their product
    "cbsa_aligned": {"cells": 8},
}
"""Name of a part -> numbers that are its own, with their defaults, where it has any.

A recipe changes them in [model.options], and the part reads them by config.option(name).
"""

INITS = {
    "parts": "initial.leave",  # as each part draws its own: CRATE, CBT
    "alpha": "initial.draw_alpha",  # as CRATE-α's training code
    "vit": "initial.draw_vit",  # as timm for its ViT
    "tost": "initial.draw_tost",  # as ToST's code
}
