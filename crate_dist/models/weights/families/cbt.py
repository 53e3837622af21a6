"""CBT, and the CRATE and ToST that it is compared with: QishuaiWen/CBSA, the models of its CBSA_image_classification.

The three differ by their mixer alone. So this CRATE is not Ma-Lab's, which has another stem and other sizes, and this
ToST has of the published one TSSA alone: an ISTA and CRATE's residual, learned positions, a class token in the layers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from crate_dist.models.weights.families import crate, tost
from crate_dist.models.weights.families.family import NORM_AND_MAP, Family, StateDict
from crate_dist.models.weights.families.tost import convolutions

_PATCHES = (8, 16)


def _tells(state_dict: StateDict) -> dict[str, Any]:
    return _heads(state_dict, "layers.0.cbsa.step_x", 3) | convolutions(state_dict)


def _tost_tells(state_dict: StateDict) -> dict[str, Any]:
    told = {"in_bias": "layers.0.tssa.subspaces.bias" in state_dict}
    return _heads(state_dict, "layers.0.tssa.temperature", 2) | convolutions(state_dict) | told


def _heads(state_dict: StateDict, name: str, ndim: int) -> dict[str, Any]:
    """Returns how many heads a tensor has a number for each of."""
    each = state_dict.get(name)
    return {} if each is None or each.ndim != ndim else {"heads": len(each)}


def _mixed_by(mixer: str, parameters: dict[str, str]) -> dict[str, str]:
    """Returns our and their names in a model with this mixer. parameters: the same of what is the mixer's own"""
    own = {f"layers.{{}}.{mixer}.{ours}": f"transformer.layers.{{}}.0.fn.{name}" for ours, name in parameters.items()}
    return {
        "pos_embedding": "pos_embedding",
        "cls_token": "cls_token",
        **{f"patch_embed.convolutions.{number}": f"to_patch_embedding.proj.{2 * number}.0" for number in range(4)},
        **{f"patch_embed.norms.{number}": f"to_patch_embedding.proj.{2 * number}.1" for number in range(4)},
        f"layers.{{}}.{mixer}_norm": "transformer.layers.{}.0.norm",
        **own,
        f"layers.{{}}.{mixer}.out": "transformer.layers.{}.0.fn.to_out",
        "layers.{}.ista_norm": "transformer.layers.{}.1.norm",
        "layers.{}.ista.dictionary": "transformer.layers.{}.1.fn.weight",
        "head.norm": "mlp_head.0",
        "head.linear": "mlp_head.1",
    }


FAMILY = Family(
    name="CBT",
    paper="2509.16875",
    citation="""\
@inproceedings{wen2025towards,
  title     = {Towards Interpretable and Efficient Attention: Compressing All by Contracting a Few},
  author    = {Wen, Qishuai and Huang, Zhiyuan and Li, Chun-Guang},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {38},
  year      = {2025},
  note      = {arXiv:2509.16875}
}""",
    sizes={"cbt_tiny": _PATCHES, "cbt_small": _PATCHES, "cbt_base": _PATCHES, "cbt_large": _PATCHES},
    unbuilt=("cbt_base", "cbt_large"),
    names=_mixed_by("cbsa", {"subspaces": "proj", "step_x": "step_x", "step_rep": "step_rep"}),
    options={"cells": 8},
    marks=("layers.0.cbsa.step_x",),
    tells=_tells,
    new_head=NORM_AND_MAP,
)

_STEM = "patch_embed.convolutions.0.weight"

CRATE = replace(
    FAMILY,
    name="CRATE baseline of CBT",
    options={},
    citation=f"{FAMILY.citation}\n\n{crate.FAMILY.citation}",
    sizes={"cbsa_crate_tiny": (16,), "cbsa_crate_small": (16,)},  # which tell the heads, as CRATE's do
    fewest_heads=2,  # there MSSA has its output map with a single head, too
    names=_mixed_by("mssa", {"subspaces": "qkv"}),
    marks=("layers.0.mssa.subspaces.weight", "layers.0.ista.dictionary", _STEM),
    tells=convolutions,
)

TOST = replace(
    FAMILY,
    name="ToST baseline of CBT",
    options={},
    citation=f"{FAMILY.citation}\n\n{tost.FAMILY.citation}",
    sizes={"cbsa_tost_tiny": _PATCHES, "cbsa_tost_small": _PATCHES},
    names=_mixed_by("tssa", {"subspaces": "qkv", "temperature": "temp"}),
    marks=("layers.0.tssa.temperature", "layers.0.ista.dictionary", _STEM),
    tells=_tost_tells,
)
