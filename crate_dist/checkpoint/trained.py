"""Opens what was trained, wherever it lies: a run, one of its checkpoints, or a file of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from crate_dist.checkpoint.format import AVERAGE, HEAD, MANIFEST, WEIGHTS, CheckpointError
from crate_dist.checkpoint.loading import list_checkpoints, open_checkpoint
from crate_dist.config import DataSection, ImageSection, Recipe, RecipeError, WeightsKind, recipe_of
from crate_dist.errors import UserError
from crate_dist.models.build import build_model
from crate_dist.models.transformer import Transformer
from crate_dist.models.weights.names import WeightsError, check_fit
from crate_dist.models.weights.read import load_model
from crate_dist.run.folder import RunFolder, read_recipe, runs_in


@dataclass(frozen=True)
class Trained:
    """An fp32 model, how its run prepared images and which classes it has, as far as that is known, and its name.

    classes: ids; class_names: the same for people; recipe: without what does not decide the result, where a file of
    weights told it
    borrowed: where `classes` are the names of other data's, by position, as the model told "number"s, or none at all
    """

    model: Transformer
    data: DataSection
    images: ImageSection
    precision: str
    name: str
    classes: tuple[str, ...] | None = None
    class_names: tuple[str, ...] | None = None
    recipe: Recipe | None = None
    borrowed: Literal["number", "position"] | None = None


def load_trained(source: Path, heads: int | None = None, weights: WeightsKind | None = None) -> Trained:
    """Opens a run (its newest checkpoint), a checkpoint, or a file of weights.

    heads: for files of weights that do not tell them
    weights: "ema": the average of a checkpoint's weights; "raw": these themselves, as without; of a file of ours: what
    must be in it
    Raises CheckpointError, WeightsError, RecipeError: when `source` is none of these, damaged, or without such weights.
    """
    if not source.is_dir():
        model, meta = load_model(source, heads, weights)
        known = {key: meta[key] for key in ImageSection.model_fields if key in meta}
        try:
            images = ImageSection(**known)
        except ValidationError as error:
            raise WeightsError(f"{source} does not say how its images are prepared: {error}") from error
        classes = _names(meta.get("classes")), _names(meta.get("class_names"))
        told = meta.get("precision", "fp32"), str(source), *classes, _recipe_in(meta)
        return Trained(model.float(), DataSection(), images, *told)
    if (run := RunFolder(source)).recipe_file.is_file():
        checkpoints = list_checkpoints(run.checkpoints)
        if not checkpoints:
            raise CheckpointError(
                f"the run {source} has no checkpoint yet; it saves every checkpoint.every_steps steps"
            )
        saved = checkpoints[-1]
    elif (source / MANIFEST).is_file():
        saved = open_checkpoint(source)
    else:
        runs = runs_in(source)
        raise CheckpointError(
            f"{source} is neither a run nor a checkpoint: there is no recipe.toml and no {MANIFEST} in it; "
            + (f"the runs in it are {runs}: give one of them" if runs else "a file of weights would do too")
        )
    if problem := saved.damaged():
        raise CheckpointError(f"{problem}; it is damaged: give an older checkpoint, or the weights in model-last.pt")
    recipe = read_recipe(RunFolder.of_checkpoint(saved.path).path)
    kind = AVERAGE if weights == "ema" else WEIGHTS
    if kind not in saved.manifest.kinds:
        raise CheckpointError(
            f"'ema' weights were asked for, and {saved.path} has no moving average of the weights: its run had "
            "optim.ema_decay = 0; 'raw' are the weights themselves"
        )
    num_classes = saved.manifest.num_classes
    if num_classes is None:
        raise CheckpointError(f"{saved.path / MANIFEST} is not a CRATE's: {HEAD} is no matrix in it")
    model, state_dict = build_model(recipe.model, num_classes, seed=0), saved.weights(kind)
    try:
        check_fit(state_dict, model.config)
    except WeightsError as error:
        raise CheckpointError(f"{saved.path / MANIFEST} does not fit the recipe of its run: {error}") from error
    model.load_state_dict(state_dict)
    if heads not in (None, model.config.heads):
        raise WeightsError(f"{saved.path}: its model has {model.config.heads} heads, and {heads} were given")
    classes = _names(saved.manifest.classes), _names(saved.manifest.class_names)
    name = f"{saved.path}{', average of the weights' if weights == 'ema' else ''}"
    return Trained(model, recipe.data, recipe.images, recipe.train.precision, name, *classes, recipe)


def find_layer(asked: int | None, depth: int) -> int:
    """Returns the layer, 1 … depth, that --layer asks for: the last for None and -1. Raises UserError."""
    layer = depth if asked is None else asked + depth + 1 if asked < 0 else asked
    if not 1 <= layer <= depth:
        raise UserError(f"--layer {asked}: the model has layers 1 to {depth}, the last also being -1")
    return layer


def class_ids_are_numbers(classes: Sequence[str]) -> bool:
    """Returns whether classes are called 0, 1, 2, …, as those of shards are for which nobody gave names.

    That two models or splits have such classes says nothing of what these are.
    """
    return all(name == str(number) for number, name in enumerate(classes))


def _recipe_in(meta: Mapping[str, Any]) -> Recipe | None:
    """Reads the recipe that an export was trained with; None where it says none, or none that this version knows."""
    name, values = meta.get("recipe"), meta.get("recipe_values")
    try:
        return recipe_of(name, values) if isinstance(name, str) and isinstance(values, Mapping) else None
    except RecipeError:
        return None


def _names(classes: Any) -> tuple[str, ...] | None:
    return tuple(map(str, classes)) if isinstance(classes, list) else None
