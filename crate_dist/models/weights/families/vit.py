"""ViT: the baseline of CRATE's main.py, and timm's own with a class token.

Those of timm's that read the patches (global_pool="avg") have the names of CRATE's; the files tell them apart, or not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from crate_dist.models.weights.families.family import CONVOLVED, Family, StateDict, ratio_of


def _tells(state_dict: StateDict) -> dict[str, Any]:
    return ratio_of(state_dict, "layers.0.mlp.hidden.weight", 0)


_NAMES = {
    "pos_embedding": "pos_embed",
    "cls_token": "cls_token",
    "patch_embed.proj": "patch_embed.proj",
    "layers.{}.attention_norm": "blocks.{}.norm1",
    "layers.{}.attention.qkv": "blocks.{}.attn.qkv",
    "layers.{}.attention.out": "blocks.{}.attn.proj",
    "layers.{}.mlp_norm": "blocks.{}.norm2",
    "layers.{}.mlp.hidden": "blocks.{}.mlp.fc1",
    "layers.{}.mlp.out": "blocks.{}.mlp.fc2",
    "head.linear": "head",
}

FAMILY = Family(
    name="ViT",
    paper="2010.11929",
    citation="""\
@inproceedings{dosovitskiy2021image,
  title     = {An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale},
  author    = {Dosovitskiy, Alexey and Beyer, Lucas and Kolesnikov, Alexander and Weissenborn, Dirk and
               Zhai, Xiaohua and Unterthiner, Thomas and Dehghani, Mostafa and Minderer, Matthias and
               Heigold, Georg and Gelly, Sylvain and Uszkoreit, Jakob and Houlsby, Neil},
  booktitle = {International Conference on Learning Representations},
  year      = {2021},
  note      = {arXiv:2010.11929}
}""",
    sizes={"vit_tiny": (8, 16, 32), "vit_small": (8, 16, 32)},
    names=_NAMES | {"head.norm": "fc_norm"},
    marks=("layers.0.attention.qkv.weight", "head.norm.weight"),
    turned=CONVOLVED,
    tells=_tells,
)

TIMM = replace(
    FAMILY, parts={"head": "linear"}, names=_NAMES | {"head.norm": "norm"}, key=None, evaluated={"eval_crop": 0.9}
)
"""Evaluated as timm does its DeiT, bicubic; of others it has other means (weights/provenance.py)."""
