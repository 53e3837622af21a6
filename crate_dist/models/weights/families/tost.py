"""ToST: RobinWu218/ToST, whose training code saves the command's options and an average of the weights beside them."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from crate_dist.models.weights.families.family import Family, StateDict, ratio_of

_PATCHES = (8, 16)


def convolutions(state_dict: StateDict) -> dict[str, Any]:
    """Returns the size of the patches, as the number of the stem's convolutions tells it."""
    halvings = {match[1] for name in state_dict if (match := re.match(r"patch_embed\.convolutions\.(\d+)\.", name))}
    return {"patch_size": 2 ** len(halvings)} if 0 < len(halvings) < 16 else {}


def _tells(state_dict: StateDict) -> dict[str, Any]:
    temperature = state_dict.get("layers.0.tssa.temperature")
    heads = {} if temperature is None or temperature.ndim != 2 else {"heads": len(temperature)}
    return heads | convolutions(state_dict) | ratio_of(state_dict, "layers.0.mlp.hidden.weight", 0)


def _as_matrix(weight: Tensor) -> Tensor:
    """Turns the weight of a 1 x 1 convolution, (d, 64, 1, 1), to that of a linear map."""
    return weight.flatten(1) if weight.ndim == 4 else weight


FAMILY = Family(
    name="ToST",
    paper="2412.17810",
    citation="""\
@inproceedings{wu2025token,
  title     = {Token Statistics Transformer: Linear-Time Attention via Variational Rate Reduction},
  author    = {Wu, Ziyang and Ding, Tianjiao and Lu, Yifu and Pai, Druv and Zhang, Jingyuan and Wang, Weida and
               Yu, Yaodong and Ma, Yi and Haeffele, Benjamin D.},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  note      = {arXiv:2412.17810}
}""",
    sizes={
        "tost_tiny_12": _PATCHES,
        "tost_small_12": _PATCHES,
        "tost_tiny_24": _PATCHES,
        "tost_small_24": _PATCHES,
        "tost_medium_24": _PATCHES,
        "tost_large_24": _PATCHES,
    },
    names={
        "head.cls_token": "cls_token",
        **{f"patch_embed.convolutions.{number}": f"patch_embed.proj.{2 * number}.0" for number in range(4)},
        **{f"patch_embed.norms.{number}": f"patch_embed.proj.{2 * number}.1" for number in range(4)},
        "layers.{}.tssa_scale": "blocks.{}.gamma1",
        "layers.{}.mlp_scale": "blocks.{}.gamma2",
        "layers.{}.tssa_norm": "blocks.{}.norm1",
        "layers.{}.tssa.temperature": "blocks.{}.attn.temp",
        "layers.{}.tssa.subspaces": "blocks.{}.attn.qkv",
        "layers.{}.tssa.out": "blocks.{}.attn.to_out.0",
        "layers.{}.mlp_norm": "blocks.{}.norm2",
        "layers.{}.mlp.hidden": "blocks.{}.mlp.fc1",
        "layers.{}.mlp.out": "blocks.{}.mlp.fc2",
        "head.blocks.{}.attention_scale": "cls_attn_blocks.{}.gamma1",
        "head.blocks.{}.mlp_scale": "cls_attn_blocks.{}.gamma2",
        "head.blocks.{}.attention_norm": "cls_attn_blocks.{}.norm1",
        "head.blocks.{}.attention.qkv": "cls_attn_blocks.{}.attn.qkv",
        "head.blocks.{}.attention.out": "cls_attn_blocks.{}.attn.proj",
        "head.blocks.{}.mlp_norm": "cls_attn_blocks.{}.norm2",
        "head.blocks.{}.mlp.hidden": "cls_attn_blocks.{}.mlp.fc1",
        "head.blocks.{}.mlp.out": "cls_attn_blocks.{}.mlp.fc2",
        "head.norm": "norm",
        "head.linear": "head",
        "positions.proj": "pos_embeder.token_projection",
    },
    marks=("layers.0.tssa.temperature",),
    turned={"positions.proj.weight": (_as_matrix, lambda weight: weight[:, :, None, None])},
    tells=_tells,
    key="model",
    wrapped=False,
    evaluated={},
)
