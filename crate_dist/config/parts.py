"""The parts of a model: the name of each in a recipe, and its class below crate_dist.models. Imports no torch.

A new operator is a file and a row here; docs/hacking.md adds one.
"""

from __future__ import annotations

STEMS = {
    "patches": "stems.patches.PatchEmbedding",  # CRATE: LayerNorm, Linear, LayerNorm
    "convolutions": "stems.convolutions.ConvolutionStem",  # ToST, CBT: 3 x 3 of stride 2, batch norm, GELU
}

MIXERS = {
    "mssa": "mixers.mssa.MSSA",  # CRATE
    "tssa": "mixers.tssa.TSSA",  # ToST
    "cbsa": "mixers.cbsa.CBSA",  # CBT, its grid of patches shifted by one, as published
    "cbsa_aligned": "mixers.cbsa.AlignedCBSA",  # the same with the grid in its place
}

TOKENWISE = {
    "ista": "tokenwise.ista.ISTA",  # CRATE
    "mlp": "tokenwise.mlp.MLP",  # ToST, ViT
}

RESIDUALS = {
    "crate": "residuals.crate.CrateLayer",  # z = f(LN(z + m(LN z)))
    "pre_norm": "residuals.pre_norm.PreNormLayer",  # z += m(LN z); z += f(LN z)
}

HEADS = {
    "linear": "heads.linear.LinearHead",  # LayerNorm and Linear of the class token, or of the tokens' mean
    "class_attention": "heads.class_attention.ClassAttentionHead",  # ToST: a class token that reads the patches
}
