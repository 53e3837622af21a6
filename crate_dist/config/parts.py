"""The parts of a model: the name of each in a recipe, and its class below crate_dist.models. Imports no torch.

A new operator is a file and a row here; docs/hacking.md adds one.
"""

from __future__ import annotations

STEMS = {
    "patches": "stems.patches.PatchEmbedding",  # CRATE: LayerNorm, Linear, LayerNorm
}

MIXERS = {
    "mssa": "mixers.mssa.MSSA",  # CRATE
}

TOKENWISE = {
    "ista": "tokenwise.ista.ISTA",  # CRATE
}

RESIDUALS = {
    "crate": "residuals.crate.CrateLayer",  # z = f(LN(z + m(LN z)))
    "pre_norm": "residuals.pre_norm.PreNormLayer",  # z += m(LN z); z += f(LN z)
}

HEADS = {
    "linear": "heads.linear.LinearHead",  # LayerNorm and Linear of the class token, or of the tokens' mean
}
