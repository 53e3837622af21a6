"""The families of models whose published weights are read and written, a file each; which one a file is of."""

from __future__ import annotations

from crate_dist.config.rules import unread
from crate_dist.models.config import ModelConfig
from crate_dist.models.weights.families import alpha, cbt, crate, tost, vit
from crate_dist.models.weights.families.family import Family, StateDict

FAMILIES = (alpha.FAMILY, cbt.FAMILY, cbt.TOST, cbt.CRATE, tost.FAMILY, vit.FAMILY, vit.TIMM, crate.FAMILY)
"""Where names do not tell two of them apart, the first."""

PARTS = ("stem", "positions", "class_token", "mixer", "tokenwise", "residual", "head", "in_bias", "out_bias")
"""Fields of ModelConfig that tell the families apart."""


def family_of(state_dict: StateDict) -> tuple[Family, bool]:
    """Returns the family that weights are of by their names, and whether these are the published code's.

    CRATE, under our names, where they are of none.
    """
    for published in (True, False):
        for family in FAMILIES:
            if all(mark in state_dict for mark in (family.their_marks() if published else family.marks)):
                return family, published
    return crate.FAMILY, False


def parts_of(config: ModelConfig) -> dict[str, object]:
    """Returns the fields of `PARTS` that say anything of a model's parts, with their values."""
    return {name: getattr(config, name) for name in PARTS if name not in unread(config)}


def family_that_computes(config: ModelConfig) -> Family | None:
    """Returns the family whose published code has the parts of `config`, of whatever size; None: no one's has."""
    parts = parts_of(config)
    for family in FAMILIES:
        row = family.row(next(iter(family.sizes)))
        same = all(getattr(row, name) == part for name, part in parts.items())
        same &= "layer_scale" in unread(config) or (config.layer_scale > 0) == (row.layer_scale > 0)
        if same and config.heads >= family.fewest_heads:
            return family
    return None
