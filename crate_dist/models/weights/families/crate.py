"""CRATE: Ma-Lab-Berkeley/CRATE."""

from __future__ import annotations

from crate_dist.models.weights.families.family import NORM_AND_MAP, Family, only_head

FAMILY = Family(
    name="CRATE",
    paper="2306.01129",
    citation="""\
@inproceedings{yu2023whitebox,
  title     = {White-Box Transformers via Sparse Rate Reduction},
  author    = {Yu, Yaodong and Buchanan, Sam and Pai, Druv and Chu, Tianzhe and Wu, Ziyang and Tong, Shengbang and
               Haeffele, Benjamin D. and Ma, Yi},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {36},
  year      = {2023},
  note      = {arXiv:2306.01129}
}

@article{yu2023compression,
  title   = {White-Box Transformers via Sparse Rate Reduction: Compression Is All There Is?},
  author  = {Yu, Yaodong and Buchanan, Sam and Pai, Druv and Chu, Tianzhe and Wu, Ziyang and Tong, Shengbang and
             Bai, Hao and Zhai, Yuexiang and Haeffele, Benjamin D. and Ma, Yi},
  journal = {arXiv preprint arXiv:2311.13110},
  year    = {2023}
}""",
    # The demo of its segmentation (`CRATE_base_demo`) has the width and depth of CRATE-B at patches of 8 pixels, and
    # half as many heads: a size tells the heads at 16 alone.
    sizes={"crate_tiny": (16,), "crate_small": (16,), "crate_base": (16,), "crate_large": (16,)},
    names={
        "pos_embedding": "pos_embedding",
        "cls_token": "cls_token",
        "patch_embed.norm_in": "to_patch_embedding.1",
        "patch_embed.proj": "to_patch_embedding.2",
        "patch_embed.norm_out": "to_patch_embedding.3",
        "layers.{}.mssa_norm": "transformer.layers.{}.0.norm",
        "layers.{}.mssa.subspaces": "transformer.layers.{}.0.fn.qkv",
        "layers.{}.mssa.out": "transformer.layers.{}.0.fn.to_out.0",
        "layers.{}.ista_norm": "transformer.layers.{}.1.norm",
        "layers.{}.ista.dictionary": "transformer.layers.{}.1.fn.weight",
        "head.norm": "mlp_head.0",
        "head.linear": "mlp_head.1",
    },
    marks=("layers.0.mssa.subspaces.weight",),
    tells=only_head,
    new_head=NORM_AND_MAP,
)
