"""Makes the weights of one model the first weights of another: other classes, another resolution.

Taken as they are: everything that does not depend on these. Interpolated: the positions, from one grid of patches to
another, and the patch embedding, from one size of patches to another, where it is one map. Left out, for the new
model's own: the head, or its rows for classes that the other did not have. Nothing else can differ; what does is an
error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from crate_dist.models.build import find_arch
from crate_dist.models.config import CHANNELS, ModelConfig
from crate_dist.models.positions import interpolate_positions
from crate_dist.models.transformer import Transformer
from crate_dist.models.weights.families import family_of
from crate_dist.models.weights.names import StateDict, WeightsError

_NO_WEIGHTS = (
    "pool",
    "ista_step",
    "ista_threshold",
    "mixer",
    "tokenwise",
    "residual",
    "norm_eps",
    "head_norm_eps",
    "options",
)
"""Fields of ModelConfig that may have no trace in the weights, but make another function of them."""


@dataclass(frozen=True)
class Adapted:
    """fp32 weights that fit the new model, without a head that is to be new; notes: what was changed, in words."""

    state_dict: dict[str, Tensor]
    notes: tuple[str, ...]


def adapt(state_dict: StateDict, source: ModelConfig, target: ModelConfig, new_head: bool) -> Adapted:
    """Makes the weights of a model `source` fit a model `target`. Changes nothing that it is given.

    new_head: leaves out of the head what the published fine-tuning code of the weights' family does: its linear map, in
    CRATE and CBT its normalisation too; all of the head where it is another part
    Raises WeightsError when width, depth, heads or the weights of parts differ, when the head is to be kept for another
    number of classes, when the stem cannot have other patches, or when a weight is not finite.
    """
    last = family_of(state_dict)[0].new_head if source.head == target.head else ("head.",)
    left_out = last if new_head else ()
    _check_size(state_dict, source, target, left_out)
    if source.num_classes != target.num_classes and not new_head:
        raise WeightsError(
            f"the head has {source.num_classes} classes, and the recipe's model {target.num_classes}; "
            'train.init_head = "new" makes a new one'
        )
    wrong = [name for name, tensor in state_dict.items() if not bool(torch.isfinite(tensor).all())]
    if wrong:
        raise WeightsError(f"not finite: {', '.join(wrong)}")
    taken = {name: t.float() for name, t in state_dict.items() if not name.startswith(left_out)}
    notes = []
    if source.patch_size != target.patch_size:
        taken |= resize_patch_embedding(taken, source.patch_size, target.patch_size)
        notes.append(f"patch embedding resized from {source.patch_size} to {target.patch_size} pixels")
    before, now = (config.image_size // config.patch_size for config in (source, target))
    if before != now and "pos_embedding" in taken:
        taken["pos_embedding"] = interpolate_positions(taken["pos_embedding"], (now, now))
        notes.append(f"positions interpolated from {before} x {before} to {now} x {now} patches")
    if new_head:
        notes.append(f"head new, {source.num_classes} classes there and {target.num_classes} here")
    for name in _NO_WEIGHTS if new_head else ("head", *_NO_WEIGHTS):
        there, here = getattr(source, name), getattr(target, name)
        if there != here:
            notes.append(f"{name} {there} there and {here} here")
    return Adapted(taken, tuple(notes))


def map_head(state_dict: StateDict, own: StateDict, rows: Sequence[int | None]) -> dict[str, Tensor]:
    """Returns weights whose head has the row `rows[k]` for class k, and that of the weights `own` where it is None."""
    mapped = dict(state_dict)
    found = [(new, old) for new, old in enumerate(rows) if old is not None]
    for name in ("head.linear.weight", "head.linear.bias"):
        mapped[name] = own[name].float().clone()
        for new, old in found:
            mapped[name][new] = state_dict[name][old]
    return mapped


def resize_patch_embedding(state_dict: StateDict, old: int, new: int) -> dict[str, Tensor]:
    """Resizes the embedding of patches of old x old pixels for patches of new x new that show the same.

    FlexiViT's pseudo-inverse resize (Beyer et al. 2023, arXiv 2212.08013, section 3.4): with B the matrix that resizes
    a patch, W B⁺ B x = W x where patches grow, and as nearly as can be where they shrink. Where a normalisation comes
    before it, its scale and shift, one per pixel, are first taken into W and the bias.
    Raises WeightsError when it is not one map.
    """
    if "patch_embed.proj.weight" not in state_dict:
        raise WeightsError(
            f"its stem of convolutions makes patches of {old} pixels and cannot be resized to make ones of {new}; "
            f"--set model.patch_size={old} would fit"
        )
    weight, bias = (state_dict[f"patch_embed.proj.{name}"].double() for name in ("weight", "bias"))
    normed = "patch_embed.norm_in.weight" in state_dict
    scale, shift = torch.ones(weight.shape[1]).double(), torch.zeros(weight.shape[1]).double()
    if normed:
        scale, shift = (state_dict[f"patch_embed.norm_in.{name}"].double() for name in ("weight", "bias"))
    each_pixel = torch.eye(old**2, dtype=torch.float64).view(old**2, 1, old, old)
    resize = interpolate(each_pixel, (new, new), mode="bicubic", antialias=True).flatten(1).T  # (new², old²)
    pixels = (weight * scale).unflatten(1, (old**2, CHANNELS))
    resized = torch.einsum("dpc,pq->dqc", pixels, torch.linalg.pinv(resize)).flatten(1)
    norm = {
        "patch_embed.norm_in.weight": torch.ones(resized.shape[1]),
        "patch_embed.norm_in.bias": torch.zeros(resized.shape[1]),
    }
    return (norm if normed else {}) | {
        "patch_embed.proj.weight": resized.float(),
        "patch_embed.proj.bias": (bias + weight @ shift).float(),
    }


def _check_size(state_dict: StateDict, source: ModelConfig, target: ModelConfig, left_out: tuple[str, ...]) -> None:
    """Raises WeightsError that names every tensor which has another shape for its width, depth, heads or parts."""
    if source.patch_size != target.patch_size and source.stem == target.stem == "convolutions":
        resize_patch_embedding({}, source.patch_size, target.patch_size)
    like_source = {name: getattr(source, name) for name in ("image_size", "patch_size", "num_classes")}
    with torch.device("meta"):
        expected = {name: t.shape for name, t in Transformer(replace(target, **like_source)).state_dict().items()}
    given = {name: t.shape for name, t in state_dict.items()}
    differ = {name for name in given.keys() | expected.keys() if given.get(name) != expected.get(name)}
    if source.heads == target.heads and all(name.startswith(left_out) for name in differ):
        return
    layers: dict[tuple[str, str], list[int]] = {}
    for name in [*given, *(name for name in expected if name not in given)]:
        if name in differ:
            there, here = (str(tuple(shapes[name])) if name in shapes else "none" for shapes in (given, expected))
            number = re.match(r"layers\.(\d+)\.", name)
            pattern = name.replace(f"layers.{number[1]}.", "layers.{}.", 1) if number else name
            layers.setdefault((pattern, f"{there} there, {here} here"), []).append(int(number[1]) if number else 0)
    lines = [
        f"  {pattern.format(f'{numbers[0]}-{numbers[-1]}' if len(numbers) > 1 else numbers[0])}: {shapes}"
        for (pattern, shapes), numbers in layers.items()
    ]
    arch = find_arch(source)
    advice = f"--set model.arch={arch} would fit" if arch else "no recipe's model has this size"
    raise WeightsError(
        "\n".join(
            [f"the weights are those of {_size(source)}, the recipe's model is {_size(target)}; {advice}", *lines]
        )
    )


def _size(config: ModelConfig) -> str:
    return (
        f"{find_arch(config) or 'a model of its own size'} "
        f"(width {config.dim}, {config.depth} layers, {config.heads} heads)"
    )
