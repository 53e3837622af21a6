"""Names and shapes of weights, here and in the published code, and the architecture that they tell."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from crate_dist.config import ImageSection
from crate_dist.config.archs import ARCHS
from crate_dist.errors import UserError
from crate_dist.models.build import find_arch
from crate_dist.models.config import CHANNELS, ModelConfig
from crate_dist.models.transformer import Transformer
from crate_dist.models.weights.families import family_of
from crate_dist.models.weights.families.family import Family, StateDict, rename_all

FORMATS = ("crate-dist/1", "crate-dist/2")
"""The first has no more of a ModelConfig than `_OF_THE_FIRST`, and the versions before others' parts read it too."""
_OF_THE_FIRST = {"arch", "image_size", "patch_size", "num_classes", "dim", "depth", "heads", "pool"}
_OF_THE_FIRST |= {"dropout", "emb_dropout", "ista_step", "ista_threshold"}
_CRATE = dataclasses.asdict(ModelConfig(image_size=1, patch_size=1, num_classes=1, dim=1, depth=1, heads=1))
_IMAGE_SIZE = 224
"""Pixels: taken for the side of images where positions are no weights, and images of any size fit."""
_LARGEST = 16_384
"""Pixels: the largest side of images that is believed of a file."""
UNSEEN = ("heads", "pool", "ista_step", "ista_threshold", "norm_eps", "head_norm_eps")
"""Fields of ModelConfig that leave no trace in the shapes."""
SCALE = "layer_scale"
"""The field of which shapes tell whether there is one, and not its first value."""
UNPLACED = "image_size"
"""The field that leaves none where positions are no weights."""
_COMPILED = "_orig_mod."
"""What torch.compile puts before the names of a module, wherever it stands in the model."""
RECORDED = (*ImageSection.model_fields, "precision", "classes", "class_names", "ema_decay")
"""What decides how a run's model is evaluated, what its predictions are called, and which of its weights they are."""


class WeightsError(UserError, ValueError):
    """Weights that cannot be used; the message names the file or the tensors and what would do."""


def config_to_plain(config: ModelConfig) -> dict[str, Any]:
    """Returns the architecture as our files say it; `arch` is for people.

    What CRATE alone did not have is left out where it is as in CRATE.
    """
    plain = {"arch": find_arch(config), **dataclasses.asdict(config)}
    return {key: value for key, value in plain.items() if key in _OF_THE_FIRST or value != _CRATE[key]}


def format_of(plain: Mapping[str, Any]) -> str:
    """Returns the first format that has a place for what config_to_plain returns."""
    return FORMATS[not plain.keys() <= _OF_THE_FIRST]


def config_from_plain(plain: Mapping[str, Any]) -> ModelConfig:
    """Reads what config_to_plain returns. Raises TypeError, ValueError or AttributeError for anything else."""
    return ModelConfig(**{key: value for key, value in plain.items() if key != "arch"})


def from_reference(state_dict: StateDict) -> dict[str, Tensor]:
    """Renames a published code's tensors to ours; what wraps names is dropped, unknown ones are kept as they are.

    Raises ValueError where two tensors would have the same name.
    """
    return recognised(state_dict)[0]


def recognised(state_dict: StateDict) -> tuple[dict[str, Tensor], Family, bool]:
    """Does as `from_reference`: (our tensors, their family, whether their names were the published code's).

    Raises ValueError where two tensors would have the same name.
    """
    bare = rename_all(state_dict, lambda name: name.replace(_COMPILED, "").removeprefix("module."))
    family, published = family_of(bare)
    return family.to_ours(bare) if published else bare, family, published


def join_classifier_heads(state_dict: StateDict) -> tuple[dict[str, Tensor], str]:
    """Joins two heads, `head.*` beside `head.linear.*`: (weights with one head, what was done in words).

    Two kinds of files have both. In the demo of segmentation `mlp_head` gives as many features as it takes, from which
    `head` makes the scores: one linear map after the other is one linear map. In all others `head` was left over from
    another model, and the published code's `forward` never calls it.
    """
    beside = {name: state_dict[name] for name in ("head.weight", "head.bias") if name in state_dict}
    rest = {name: tensor for name, tensor in state_dict.items() if name not in beside}
    first, bias = rest.get("head.linear.weight"), rest.get("head.linear.bias")
    if not beside or first is None or bias is None:
        return dict(state_dict), ""
    weight, shift = beside.get("head.weight", torch.empty(0)), beside.get("head.bias", torch.empty(0))
    features = bias.shape
    if weight.ndim != 2 or shift.shape != weight.shape[:1] or not first.shape == features * 2 == weight.shape[1:] * 2:
        return rest, "head.* left out: it stands beside mlp_head.*, which is the head that the published code calls"
    joined = weight.double() @ first.double(), weight.double() @ bias.double() + shift.double()
    for name, tensor in zip(("head.linear.weight", "head.linear.bias"), joined, strict=True):
        rest[name] = tensor.to(first.dtype)
    return rest, "head.* joined with mlp_head.1, whose features it reads, into one linear map"


def to_reference(state_dict: StateDict, prefix: str = "") -> dict[str, Tensor]:
    """Renames our tensors to their family's published ones, with `prefix` ("module." or nothing) before each."""
    return family_of(state_dict)[0].to_theirs(state_dict, prefix)


def infer_config(state_dict: StateDict, heads: int | None = None, family: Family | None = None) -> ModelConfig:
    """Finds the architecture of weights under crate-dist's names, as far as shapes tell it, with defaults for the rest.

    Where the number of heads leaves no trace in the shapes it is `heads`, or that of the published size with this
    width, depth and patch. family: theirs; None: the one that their names tell
    Raises WeightsError when neither is at hand or when the weights are not those of a family.
    """
    family = family or family_of(state_dict)[0]
    if any(name.startswith("cls_attn_blocks.") for name in state_dict):  # those of a ToST have our names by now
        raise WeightsError(
            "these are the weights of XCiT or ViT in ToST's code (xcit_cab_*, vit_cab_*), which are not read; of that "
            "code ToST alone is"
        )

    def shape(name: str, ndim: int) -> torch.Size:
        if name not in state_dict:
            near = _nearest(name, state_dict)
            raise WeightsError(f"these are not the weights of a {family.name}: there is no {name!r}{near}")
        if state_dict[name].ndim != ndim:
            raise WeightsError(f"{name} has shape {tuple(state_dict[name].shape)}; expected {ndim} axes")
        return state_dict[name].shape

    row, told = family.row(next(iter(family.sizes))), family.tells(state_dict)
    tokens = shape("pos_embedding", 3)[1] if row.positions == "learned" else None
    num_classes, dim = shape("head.linear.weight", 2)
    for mark in family.marks:
        shape(mark, state_dict[mark].ndim if mark in state_dict else 0)
    depth = len({match[0] for name in state_dict if (match := re.match(r"layers\.\d+\.", name))})
    patch_size = told.pop("patch_size", 0) or math.isqrt(shape("patch_embed.proj.weight", 2)[1] // CHANNELS)
    published = family.published(dim, depth, patch_size)
    heads = heads or told.pop("heads", None) or (ARCHS[published].heads if published else None)
    if heads is None:
        raise WeightsError(
            f"no published {family.name} has width {dim} and depth {depth} with patches of {patch_size} pixels, and "
            "the number of heads cannot be read off the weights; give it (heads=, --heads)"
        )
    if heads < family.fewest_heads:
        raise WeightsError(
            f"a {family.name} has a map of the mixer's output with a single head, too, and mssa has none here; such "
            "weights are not read"
        )
    sides = _IMAGE_SIZE // max(patch_size, 1) if tokens is None else math.isqrt(max(tokens - row.class_token, 0))
    if tokens is not None and sides**2 != tokens - row.class_token:
        raise WeightsError(
            f"pos_embedding has {tokens} places, {tokens - row.class_token} of them for patches: no square grid; "
            "models are of square images here"
        )
    parts = dataclasses.asdict(family.row(published) if published else row)
    parts |= {"dim": dim, "depth": depth, "heads": heads, "patch_size": patch_size, "num_classes": num_classes} | told
    try:
        return ModelConfig(image_size=sides * patch_size, options=family.options, **parts)
    except (ValueError, ZeroDivisionError) as error:
        raise WeightsError(f"these weights fit no {family.name}: {error}") from error


def check_fit(state_dict: StateDict, config: ModelConfig) -> None:
    """Raises WeightsError that names each tensor of `state_dict` which is missing, unexpected or of another shape."""
    if config.depth > len(state_dict):  # a file may say anything; a model so deep is not built to find out
        raise WeightsError(f"{len(state_dict)} tensors are too few for a model of {config.depth:,} layers")
    if config.positions != "learned" and config.image_size > _LARGEST:
        raise WeightsError(f"images of {config.image_size:,} pixels; a model has {_LARGEST:,} at most")
    with torch.device("meta"):
        expected = Transformer(config).state_dict()
    missing, unexpected = expected.keys() - state_dict.keys(), state_dict.keys() - expected.keys()
    problems = [f"missing {name!r}" for name in expected if name in missing]
    problems += [f"unexpected {name!r}{_nearest(name, missing)}" for name in state_dict if name in unexpected]
    problems += [
        f"{name!r} has shape {tuple(state_dict[name].shape)}, the model has {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state_dict and state_dict[name].shape != tensor.shape
    ]
    problems += [
        f"{name!r} holds {str(state_dict[name].dtype).removeprefix('torch.')}, no floating-point numbers; weights that "
        "are quantised are not read"
        for name, tensor in expected.items()
        if name in state_dict and tensor.is_floating_point() and not state_dict[name].is_floating_point()
    ]
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise WeightsError("the weights do not fit the model:\n" + "\n".join(f"  {line}" for line in shown))


def not_finite(state_dict: StateDict) -> str | None:
    """Returns the name of the first tensor with a value that is NaN or infinite, or None."""
    floating = ((name, tensor) for name, tensor in state_dict.items() if tensor.is_floating_point())
    return next((name for name, tensor in floating if not tensor.float().isfinite().all()), None)


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (nearest: {close[0]!r})" if close else ""
