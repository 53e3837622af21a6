"""CBT: QishuaiWen/CBSA, the models of its CBSA_image_classification."""

from __future__ import annotations

from typing import Any

from crate_dist.models.weights.families.family import Family, StateDict
from crate_dist.models.weights.families.tost import convolutions

_PATCHES = (8, 16)


def _tells(state_dict: StateDict) -> dict[str, Any]:
    steps = state_dict.get("layers.0.cbsa.step_x")
    heads = {} if steps is None or steps.ndim != 3 else {"heads": len(steps)}
    return heads | convolutions(state_dict)


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
    names={
        "pos_embedding": "pos_embedding",
        "cls_token": "cls_token",
        **{f"patch_embed.convolutions.{number}": f"to_patch_embedding.proj.{2 * number}.0" for number in range(4)},
        **{f"patch_embed.norms.{number}": f"to_patch_embedding.proj.{2 * number}.1" for number in range(4)},
        "layers.{}.cbsa_norm": "transformer.layers.{}.0.norm",
        "layers.{}.cbsa.subspaces": "transformer.layers.{}.0.fn.proj",
        "layers.{}.cbsa.step_x": "transformer.layers.{}.0.fn.step_x",
        "layers.{}.cbsa.step_rep": "transformer.layers.{}.0.fn.step_rep",
        "layers.{}.cbsa.out": "transformer.layers.{}.0.fn.to_out",
        "layers.{}.ista_norm": "transformer.layers.{}.1.norm",
        "layers.{}.ista.dictionary": "transformer.layers.{}.1.fn.weight",
        "head.norm": "mlp_head.0",
        "head.linear": "mlp_head.1",
    },
    options={"cells": 8},
    marks=("layers.0.cbsa.step_x",),
    tells=_tells,
)
