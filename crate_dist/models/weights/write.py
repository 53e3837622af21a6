"""Writes weights, each file whole or not at all: our exports, safetensors, and what the published code reads."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crate_dist.config import ImageSection
from crate_dist.config.rules import unread
from crate_dist.files import written_whole
from crate_dist.models.batch_norm import STATISTICS
from crate_dist.models.build import find_arch
from crate_dist.models.config import ModelConfig
from crate_dist.models.weights.families import family_that_computes, parts_of
from crate_dist.models.weights.families.family import Family
from crate_dist.models.weights.names import (
    RECORDED,
    SCALE,
    UNPLACED,
    UNSEEN,
    StateDict,
    WeightsError,
    check_fit,
    config_to_plain,
    format_of,
)

logger = logging.getLogger(__name__)


def export_model(
    path: str | Path, config: ModelConfig, state_dict: StateDict, meta: Mapping[str, Any] | None = None
) -> None:
    """Writes weights alone, such that load_model and torch.load(weights_only=True) read them.

    state_dict: model.state_dict(), or fp32 master weights under the same names; views are cut from their storage
    meta: plain values that JSON can say, such as the step and the accuracy
    Raises WeightsError when the weights do not fit `config`, TypeError when `meta` is not plain, OSError.
    """
    check_fit(state_dict, config)
    model = config_to_plain(config)
    content = {
        "format": format_of(model),
        "model": model,
        "state_dict": _compact(state_dict),
        "meta": json.loads(json.dumps(dict(meta or {}))),
    }
    with written_whole(Path(path)) as file:
        torch.save(content, file)


def export_safetensors(
    path: str | Path, config: ModelConfig, state_dict: StateDict, meta: Mapping[str, Any] | None = None
) -> None:
    """Writes a safetensors file; architecture and `meta` are JSON in its header. Arguments and errors: export_model."""
    from safetensors.torch import save

    check_fit(state_dict, config)
    model = config_to_plain(config)
    about = {
        "format": "pt",  # by which other programs know whose tensors these are
        "crate_dist": format_of(model),
        "model": json.dumps(model),
        "meta": json.dumps(dict(meta or {})),
    }
    data = save(_compact(state_dict), about)
    with written_whole(Path(path)) as file:
        file.write(data)


def export_reference(
    path: str | Path,
    config: ModelConfig,
    state_dict: StateDict,
    meta: Mapping[str, Any] | None = None,
    prefix: str = "module.",
) -> None:
    """Writes what the family's published code reads, and beside it, where there is a place, what that leaves out.

    A bare state dict is all that CRATE-α's reads. The training code of the others reads a checkpoint back with
    --resume, and there stands what no shape tells of the architecture, and how the run prepared images and called its
    classes. Reading gives it back; the published code looks at what it knows, and the log says where it would compute
    something else. Its optimizer has hyperparameters and no moments, which weights alone do not have: enough for -e,
    and training goes on with new moments.

    meta: "epoch", "arch" and "best_acc1" are taken from it where they are given, else what our runs say of these
    prefix: "module." as a training code expects it, whose models are always wrapped; "" for the bare class
    Raises WeightsError when the weights do not fit `config`, or no published code has its parts; OSError.
    """
    check_fit(state_dict, config)
    family = family_that_computes(config)
    if family is None:
        parts = ", ".join(f"{name} {part}" for name, part in parts_of(config).items())
        raise WeightsError(
            f"no published code computes this model ({parts}, {config.heads} heads); the other formats hold it as it is"
        )
    meta = meta or {}
    weights = family.to_theirs(_compact(state_dict), prefix if family.key and family.wrapped else "")
    content = weights if family.key is None else _checkpoint(family, weights, config, meta)
    for reason in _unbuilt(family, config):
        logger.warning("%s: the published code cannot build this model, nor evaluate the file: %s", path, reason)
    for departure in _departures(family, config, meta):
        logger.warning("%s: the published code computes something else from these weights: %s", path, departure)
    if family.key is None and (left_out := [key for key in RECORDED if key in meta]):
        logger.warning("%s: a bare state dict has no place for %s", path, ", ".join(left_out))
    with written_whole(Path(path)) as file:
        torch.save(content, file)


def _checkpoint(family: Family, weights: StateDict, config: ModelConfig, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a training code would have saved with these weights, and what it would have left out.

    ToST's goes on with what it finds: without an optimizer's state it begins a new one.
    """
    arch = find_arch(config)
    accuracy = meta.get("best_acc1", meta.get("metrics", {}).get("val/top1", 0.0))
    epoch = int(meta.get("epoch", meta.get("epochs", 0)))
    recipe = meta.get("recipe_values")
    content = {
        "epoch": epoch,
        "arch": arch.replace("crate", "CRATE") if arch else str(meta.get("arch", family.name)),
        str(family.key): weights,
        "best_acc1": torch.tensor(float(accuracy)),
        **{name: getattr(config, name) for name in UNSEEN},
        **({} if config.positions == "learned" else {UNPLACED: config.image_size}),
        **({} if SCALE in unread(config) or not config.layer_scale else {SCALE: config.layer_scale}),
        **{key: meta[key] for key in RECORDED if key in meta},
    }
    if family.wrapped:
        learned = sum(name.rpartition(".")[2] not in STATISTICS for name in weights)
        content |= _fresh_optimizer(learned, epoch, recipe if isinstance(recipe, Mapping) else {})
    return content


def _unbuilt(family: Family, config: ModelConfig) -> Iterator[str]:
    """Says what keeps the published code from building a model of parts that it has."""
    if config.stem == "convolutions" and config.patch_size not in (published := (8, 16)):
        sizes = " or ".join(map(str, published))
        yield f"its stem is for patches of {sizes} pixels, this model's are of {config.patch_size}"
    if (arch := find_arch(config)) in family.unbuilt:
        yield f"what makes its {arch} names an operator that is not defined there"


def _departures(family: Family, config: ModelConfig, meta: Mapping[str, Any]) -> Iterator[str]:
    """Says what the published code has as constants, which are our defaults, and this model has otherwise."""
    row = family.row(next(iter(family.sizes)))
    lost = "; a bare state dict has no place for it" if family.key is None else ""
    for name in ("pool", "ista_step", "ista_threshold", "ratio", "norm_eps", "head_norm_eps"):
        published, here = getattr(row, name, getattr(ModelConfig, name)), getattr(config, name)
        if here != published and name not in unread(config):
            yield f"its {name} is {published}, this model's {here}{lost}"
    for name, published in family.options.items():
        if config.option(name) != published:
            yield f"its {name} is {published}, this model's {config.option(name)}; the file has no place for it"
    for name, published in (("mean", ImageSection().mean), ("std", ImageSection().std)):
        if name in meta and meta[name] not in (published, list(published)):
            yield f"its {name} of the pixels is {list(published)}, this model's {meta[name]}"


def _fresh_optimizer(parameters: int, epoch: int, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns states of torch's AdamW or Lion, and of the LambdaLR beside it, before their first step in epoch `epoch`.

    parameters: how many; recipe: flat keys of the run, the published code's defaults where it says nothing
    """
    rate, lion = recipe.get("optim.lr", 4e-4), recipe.get("optim.name") == "lion"
    group = {
        "lr": rate,
        "initial_lr": rate,
        "weight_decay": recipe.get("optim.weight_decay", 0.1),
        "betas": tuple(recipe.get("optim.betas") or ((0.9, 0.99) if lion else (0.9, 0.999))),
        "eps": recipe.get("optim.eps", 1e-8),
        "params": list(range(parameters)),
    }
    schedule = {"base_lrs": [rate], "last_epoch": epoch, "_step_count": epoch + 1, "_last_lr": [rate]}
    return {
        "optimizer": {"state": {}, "param_groups": [group]},
        "scheduler": {**schedule, "lr_lambdas": [None]},
    }


def _compact(state_dict: StateDict) -> dict[str, Tensor]:
    """Copies to the CPU, each into a storage of its own: torch.save writes the whole buffer that a view looks into."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in state_dict.items()
    }
