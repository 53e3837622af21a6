"""CRATE-α: UCSC-VLAA/CRATE-alpha, whose PyTorch files are bare state dicts; those of its training, `alpha_jax`."""

from __future__ import annotations

from typing import Any

from crate_dist.models.weights.families.family import CONVOLVED, Family, StateDict, only_head, ratio_of

_PATCHES = (8, 14, 16, 32)


def _tells(state_dict: StateDict) -> dict[str, Any]:
    return only_head(state_dict) | ratio_of(state_dict, "layers.0.odl.dictionary", 1)


FAMILY = Family(
    name="CRATE-α",
    paper="2405.20299",
    citation="""\
@inproceedings{yang2024scaling,
  title     = {Scaling White-Box Transformers for Vision},
  author    = {Yang, Jinrui and Li, Xianhang and Pai, Druv and Zhou, Yuyin and Ma, Yi and Yu, Yaodong and Xie, Cihang},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {37},
  year      = {2024},
  note      = {arXiv:2405.20299}
}""",
    sizes={"crate_alpha_base": _PATCHES, "crate_alpha_large": _PATCHES, "crate_alpha_huge": _PATCHES},
    names={
        "pos_embedding": "pos_embedding",
        "cls_token": "cls_token",
        "patch_embed.proj": "conv1",
        "layers.{}.mssa_norm": "transformer.layers.{}.0.norm",
        "layers.{}.mssa.subspaces": "transformer.layers.{}.0.fn.qkv",
        "layers.{}.mssa.out": "transformer.layers.{}.0.fn.to_out.0",
        "layers.{}.odl_norm": "transformer.layers.{}.1.norm",
        "layers.{}.odl.dictionary": "transformer.layers.{}.1.fn.D",
        "layers.{}.odl.out": "transformer.layers.{}.1.fn.D1",
        "head.norm": "mlp_head.0",
        "head.linear": "mlp_head.1",
    },
    marks=("layers.0.odl.dictionary",),
    turned=CONVOLVED,
    tells=_tells,
    key=None,
)
