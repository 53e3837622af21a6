"""CRATE-α's parameters as UCSC-VLAA/CRATE-alpha's training code has them, which is JAX (Flax)."""

from __future__ import annotations

import re
from typing import Any

from einops import EinopsError, rearrange
from torch import Tensor

from crate_dist.models.weights.families.family import StateDict

TREE = "params/"
"""What stands before the parameters in a checkpoint of the training, which has the optimizer's state beside them."""
_LAYER = "Transformer/encoderblock_{}"
_MSSA = f"{_LAYER}/MultiHeadDotProductSubspaceAttention_0"
_ODL = f"{_LAYER}/OvercompleteISTABlock_0"
_FIRST = f"{_MSSA}/proj/kernel".format(0)

# Theirs -> ours, and how its axes go over: y, x in a patch, c of a pixel, d of a token, h heads of p, k classes.
_NAMES = {
    "pos_embedding": ("pos_embedding", ""),
    "cls": ("cls_token", ""),
    "embedding/kernel": ("patch_embed.proj.weight", "y x c d -> d (y x c)"),
    "embedding/bias": ("patch_embed.proj.bias", ""),
    f"{_LAYER}/LayerNorm_0/scale": ("layers.{}.mssa_norm.weight", ""),
    f"{_LAYER}/LayerNorm_0/bias": ("layers.{}.mssa_norm.bias", ""),
    f"{_MSSA}/proj/kernel": ("layers.{}.mssa.subspaces.weight", "d h p -> (h p) d"),
    f"{_MSSA}/out/kernel": ("layers.{}.mssa.out.weight", "h p d -> d (h p)"),
    f"{_LAYER}/LayerNorm_1/scale": ("layers.{}.odl_norm.weight", ""),
    f"{_LAYER}/LayerNorm_1/bias": ("layers.{}.odl_norm.bias", ""),
    f"{_ODL}/D": ("layers.{}.odl.dictionary", ""),
    f"{_ODL}/D1": ("layers.{}.odl.out", ""),
    "encoder_norm/scale": ("head.norm.weight", ""),
    "encoder_norm/bias": ("head.norm.bias", ""),
    "head/kernel": ("head.linear.weight", "d k -> k d"),
    "head/bias": ("head.linear.bias", ""),
}


def is_alpha(arrays: StateDict) -> bool:
    """Returns whether arrays are CRATE-α's parameters, by their names."""
    return _FIRST in arrays and f"{_ODL}/D".format(0) in arrays


def from_jax(arrays: StateDict) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns our tensors of CRATE-α's arrays, and what these tell of a ModelConfig; unknown names are kept.

    The head's norm has Flax's ε of 1e-6 there, unlike in the PyTorch code.
    Raises ValueError when an array has other axes than that code's, or whole numbers, or when two are the same weight.
    """
    state_dict = {}
    for name, array in arrays.items():
        if not array.is_floating_point():
            raise ValueError(f"{name} has values of type {str(array.dtype).removeprefix('torch.')}, no weights")
        layer = re.match(r"Transformer/encoderblock_(\d+)/", name)
        general = f"{_LAYER}/{name[layer.end() :]}" if layer else name
        ours, axes = _NAMES.get(general, (name, ""))
        try:
            turned = rearrange(array, axes).contiguous() if axes else array
        except EinopsError as error:
            raise ValueError(
                f"{name} has shape {tuple(array.shape)}, expected the axes {axes.split(' -> ')[0]}"
            ) from error
        if (new := ours.format(layer[1]) if layer and ours != name else ours) in state_dict:
            raise ValueError(f"{name} and another array are the same weight, {new}; leave one of them out")
        state_dict[new] = turned
    stem = arrays.get("embedding/kernel")
    if stem is not None and stem.shape[0] != stem.shape[1]:
        raise ValueError(f"embedding/kernel has shape {tuple(stem.shape)}: its patches are no squares")
    return state_dict, {"heads": arrays[_FIRST].shape[1], "head_norm_eps": 1e-6}
