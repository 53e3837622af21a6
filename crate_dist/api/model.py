"""Trained and new models as notebooks want them: with their classes, their preparation of images and their recipe."""

from __future__ import annotations

import operator
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import SupportsIndex

import torch
from torch import Tensor

from crate_dist.api.preprocess import Picture, Preprocess
from crate_dist.checkpoint.format import CheckpointError
from crate_dist.checkpoint.trained import load_trained
from crate_dist.config import CONFIG_DIR, Recipe, WeightsKind, load_recipe
from crate_dist.locations import location, redacted
from crate_dist.models.adapt import adapt
from crate_dist.models.build import initialise, model_config
from crate_dist.models.config import ModelConfig
from crate_dist.models.transformer import Intermediates, Transformer
from crate_dist.models.weights.names import StateDict, WeightsError
from crate_dist.run.folder import runs_in

_TAKES = (
    "load takes a run folder (its newest checkpoint), a checkpoint in one (checkpoints/step-…), or a file of weights: "
    "model-best.pt, model-last.pt, .safetensors, a .pth.tar or .npz of the published code"
)


class Model(Transformer):
    """A model of the family, in fp32, with all that its run knew. Its state dict is that of a Transformer.

    preprocess: from pictures to what it reads
    classes: ids in the order of the logits; class_names: the same for people; None where nobody told them
    recipe: that of its training, None where a file of weights does not tell; name: what it was loaded from
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: StateDict,
        preprocess: Preprocess,
        name: str,
        recipe: Recipe | None,
        classes: tuple[str, ...] | None,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        with torch.device("meta"):
            super().__init__(config)
        self.load_state_dict(weights, assign=True)
        self.eval()
        self.preprocess, self.name, self.recipe = preprocess, name, recipe
        self.classes, self.class_names = classes, class_names or classes

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Returns logits (b, classes) of prepared images (b, 3, image_size, image_size); (classes,) of one without b.

        Raises ValueError when the images have another shape.
        """
        return super().forward(images[None], keep)[0] if images.ndim == 3 else super().forward(images, keep)

    def intermediates(self, images: Tensor) -> Intermediates:
        """Does the same pass and returns what every layer made of the tokens, for images of any size in whole patches.

        images: (b, 3, height, width), or one without b; then nothing that is returned has it either
        Raises ValueError when the sides are no multiples of the patch.
        """
        if images.ndim != 3:
            return self.forward_intermediates(images)
        inside = self.forward_intermediates(images[None])
        projections, features = (tuple(each[0] for each in part) for part in (inside.projections, inside.features))
        return Intermediates(inside.logits[0], projections, features, inside.grid, inside.mixers)

    @torch.inference_mode()
    def predict(self, picture: Picture, top: int = 5) -> list[tuple[str, float]]:
        """Returns the `top` classes of one picture with their probabilities, the likeliest first.

        Classes are called by their names, those of one name with their ids, too; by their numbers where nobody told
        names. Raises as Preprocess does.
        """
        weights = self.head.linear.weight
        images = self.preprocess(picture).to(weights.device, weights.dtype)
        likeliest = self(images).float().softmax(dim=-1).topk(min(top, self.config.num_classes))
        times, ids = Counter(self.class_names), dict(enumerate(self.classes or ()))
        names = {  # of fewer, perhaps: a head may have room for more
            label: name if times[name] == 1 else f"{name} ({ids.get(label, label)})"
            for label, name in enumerate(self.class_names or ())
        }
        return [
            (names.get(label, str(label)), share) for share, label in zip(*map(Tensor.tolist, likeliest), strict=True)
        ]


def load(
    source: str | Path,
    *,
    classes: SupportsIndex | Sequence[str] | None = None,
    image_size: int | None = None,
    heads: int | None = None,
    weights: WeightsKind | None = None,
) -> Model:
    """Opens what was trained: an fp32 model on the CPU, in evaluation mode.

    Parameters
    ----------
    source: a run (its newest checkpoint), a checkpoint, an export, a file of the published code
    classes: of a new head in place of the trained one, their number or names, to fine-tune it
    image_size: another resolution, in pixels, to whose patches positions are interpolated
    heads: of attention, for files of weights that do not tell them
    weights: "ema": the moving average of a run's or a checkpoint's weights; "raw", or nothing: these themselves

    Raises CheckpointError, WeightsError, RecipeError: when `source` is none of these, or damaged; ValueError, TypeError
    for an image_size or classes that no model can have.
    """
    path = _existing(source)
    try:
        trained = load_trained(path, heads, weights)
    except WeightsError as error:
        if path.is_dir():
            raise
        raise WeightsError(f"{error}; {_TAKES}") from error
    old, state_dict = trained.model.config, trained.model.state_dict()
    names, class_names = trained.classes, trained.class_names
    side = old.image_size if image_size is None else operator.index(image_size)
    if side < 1 or side % old.patch_size:
        below = max(1, side // old.patch_size) * old.patch_size
        raise ValueError(
            f"image_size={side} is no whole number of the model's patches of {old.patch_size} pixels; {below} or "
            f"{below + old.patch_size} would be"
        )
    config = replace(old, image_size=side)
    if classes is not None:
        (number, names), class_names = _head_of(classes), None
        config = replace(config, num_classes=number)
    if config != old:
        adapted = adapt(state_dict, old, config, new_head=classes is not None)
        state_dict = initialise(config, seed=0).state_dict() | adapted.state_dict
    preprocess = Preprocess(config.image_size, trained.images)
    return Model(config, state_dict, preprocess, trained.name, trained.recipe, names, class_names)


def create(recipe: str | Path | Recipe, classes: SupportsIndex | Sequence[str], *, seed: int | None = None) -> Model:
    """Builds the model that a recipe describes, with the weights that a run of it begins with, in evaluation mode.

    recipe: a name in configs/, such as "crate_tiny", a recipe file, or a Recipe; classes: their number, or their names
    seed: of the weights; None: the recipe's
    Raises RecipeError; ValueError, TypeError: fewer classes in the recipe than asked for, or none asked for.
    """
    number, names = _head_of(classes)
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    config = model_config(recipe.model, number)
    weights = initialise(config, recipe.train.seed if seed is None else seed).state_dict()
    preprocess = Preprocess(config.image_size, recipe.images)
    return Model(config, weights, preprocess, recipe.name, recipe, names)


def _head_of(classes: SupportsIndex | Sequence[str]) -> tuple[int, tuple[str, ...] | None]:
    """Returns the number of classes, and their names where these are given. Raises ValueError, TypeError."""
    if isinstance(classes, str):
        raise TypeError(f"classes is a number, or a list of names such as [{classes!r}], not a text")
    names: tuple[str, ...] | None = None
    try:
        number = operator.index(classes)  # type: ignore[arg-type]
    except TypeError:
        names = tuple(classes)  # type: ignore[arg-type]
        number = len(names)
    if number < 1:
        raise ValueError(f"classes={classes!r}: a model has at least one class")
    return number, names


def _existing(source: str | Path) -> Path:
    """Returns the path of something that is there. Raises CheckpointError that says what `load` takes."""
    if not isinstance(source, str | os.PathLike):
        raise CheckpointError(f"not a {type(source).__name__}: {_TAKES}")
    if isinstance(place := location(source), str):
        raise CheckpointError(f"{redacted(place)} is no file on this machine: fetch it first; {_TAKES}")
    path = place.expanduser()
    if path.exists():
        return path
    there = f"; the runs in {path.parent} are {runs}" if (runs := runs_in(path.parent)) else ""
    if (CONFIG_DIR / f"{source}.toml").is_file():
        there += f'; crate_dist.create("{source}", classes=…) makes an untrained model of that recipe'
    raise CheckpointError(f"there is nothing at {path}{there}; {_TAKES}")
