"""Makes the weights of one model the first weights of another: other classes, another resolution.

Taken as they are: everything that does not depend on these. Interpolated: the positions, from one grid of patches to
another, and the patch embedding, from one size of patches to another, where the stem knows how. Left out, for the new
model's own: the head, or its rows for classes that the other did not have. Nothing else can differ; what does is an
error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crate_dist.config.parts import STEMS
from crate_dist.config.rules import as_set, differing, for_new_head, unread
from crate_dist.models.build import find_arch
from crate_dist.models.config import ModelConfig
from crate_dist.models.parts import find_part
from crate_dist.models.positions import interpolate_positions
from crate_dist.models.transformer import Transformer
from crate_dist.models.weights.families import family_of
from crate_dist.models.weights.names import StateDict, WeightsError

_STEM = "patch_embed."
_NO_WEIGHTS = (
    "stem",
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
        taken |= _resized_stem(taken, source, target)
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
    for name in {"head.linear.weight", "head.linear.bias"} & own.keys() & state_dict.keys():
        mapped[name] = own[name].float().clone()
        for new, old in found:
            mapped[name][new] = state_dict[name][old]
    return mapped


def _resized_stem(state_dict: StateDict, source: ModelConfig, target: ModelConfig) -> dict[str, Tensor]:
    """Returns the stem's weights for the patches of `target`. Raises WeightsError when the stem cannot have these."""
    old, new = source.patch_size, target.patch_size
    own = {name.removeprefix(_STEM): t for name, t in state_dict.items() if name.startswith(_STEM)}
    resized = find_part(STEMS, source.stem).resized(own, old, new) if source.stem == target.stem else None
    if resized is None:
        same = source.stem == target.stem
        other, advice = ("", {}) if same else (f' for stem = "{target.stem}"', {"model.stem": source.stem})
        raise WeightsError(
            f'its stem = "{source.stem}" makes patches of {old} pixels and cannot be resized to make ones of {new}'
            f"{other}; {as_set(advice | {'model.patch_size': old})} would fit"
        )
    return {_STEM + name: tensor for name, tensor in resized.items()}


def _check_size(state_dict: StateDict, source: ModelConfig, target: ModelConfig, left_out: tuple[str, ...]) -> None:
    """Raises WeightsError that names every tensor which has another shape for its width, depth, heads or parts."""
    like_source = {name: getattr(source, name) for name in ("image_size", "patch_size", "num_classes")}
    other = for_new_head(differing(source, target)) if left_out else differing(source, target)
    if "model.class_token" in other and source.pool != target.pool and "pool" not in unread(source):
        other["model.pool"] = source.pool
    arch = find_arch(source)
    if arch and find_arch(target) not in (None, arch):
        other = {"model.arch": arch} | {key: value for key, value in other.items() if key.startswith("model.options.")}
    advice = f"{as_set(other)} would fit"
    try:
        config = replace(target, **like_source)
    except ValueError as error:
        raise WeightsError(
            f"the weights are those of {_size(source)}, the recipe's model is {_size(target)}, which takes no patches "
            f"of their size: {error}; {advice}"
        ) from error
    with torch.device("meta"):
        expected = {name: t.shape for name, t in Transformer(config).state_dict().items()}
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
    raise WeightsError(
        "\n".join(
            [f"the weights are those of {_size(source)}, the recipe's model is {_size(target)}; {advice}", *lines]
        )
    )


def _size(config: ModelConfig) -> str:
    return (
        f"{find_arch(config) or 'a model of no name'} (width {config.dim}, {config.depth} layers, {config.heads} heads)"
    )
