"""Estimates from shapes the GPU memory of a training step. Imports no torch: a login node asks it.

Counted is what autograd keeps of a forward pass (models/costs.py), what a backward pass has in hand at a time, and the
state of ZeRO-2. Not counted is what an allocator leaves unused between its blocks; `RESERVE` stands for it and for the
context of CUDA. For a model with a part that has no rule in costs.py all but `advice` and `checkpoint_bytes` raise its
NotKnown.
"""

from __future__ import annotations

from crate_dist.config import OptimSection, Recipe
from crate_dist.models import costs
from crate_dist.models.config import ModelConfig, model_config

IN_HAND = 6
"""Tensors of the tokens' size that a layer's backward pass holds at a time, beside what its parts' rules say."""

RESERVE = 0.12
"""Share of a card's memory that is left alone."""


def parameters(recipe: Recipe, classes: int = 1000) -> int:
    """Counts the weights of the recipe's model."""
    return costs.parameters(_config(recipe, classes))


def kept_bytes(recipe: Recipe, images: int) -> int:
    """Counts the bytes that autograd keeps of `images` images from the forward pass to the backward pass."""
    return costs.kept_bytes(_config(recipe), images, recipe.train.precision, recipe.train.recompute)


def step_bytes(recipe: Recipe, micro_batch: int, world_size: int) -> int:
    """Counts the most bytes that a rank of `world_size` needs at a time."""
    config, precision = _config(recipe), recipe.train.precision
    tokens = micro_batch * config.num_tokens * config.dim
    in_hand = (IN_HAND * tokens + costs.in_hand(config, micro_batch)) * _bytes(recipe)
    if recipe.train.recompute:
        in_hand += costs.kept_bytes(config, micro_batch, precision) // config.depth  # of the layer computed again
    passing = kept_bytes(recipe, micro_batch) + in_hand
    arriving = parameters(recipe) * _bytes(recipe) / 8  # gradients of the bucket that the backward pass fills
    return round(passing + arriving + state_bytes(recipe, world_size))


def state_bytes(recipe: Recipe, world_size: int) -> float:
    """Counts the bytes that a rank holds from one step to the next.

    All weights, and a flat vector of all gradients; of this rank's part, in fp32, the summed gradients, the master
    weights, what the optimizer keeps, and the average of the weights where the recipe has one.
    """
    part = 4 + 4 + 4 * _states(recipe.optim)
    return parameters(recipe) * (2 * _bytes(recipe) + part / world_size)


def checkpoint_bytes(recipe: Recipe, classes: int = 1000) -> int:
    """Counts the bytes of a checkpoint's tensors: master weights, what the optimizer keeps, their average; in fp32.

    What parts without a rule add is not counted.
    """
    return costs.least_parameters(_config(recipe, classes)) * 4 * (1 + _states(recipe.optim))


def largest_micro_batch(recipe: Recipe, world_size: int, card_bytes: float) -> int:
    """Finds the largest micro-batch that fits a card, divides a rank's share, and holds whole groups; 0: none."""
    share, group = recipe.train.global_batch // world_size, recipe.train.group
    room, sizes = card_bytes * (1 - RESERVE), range(share // group * group, 0, -group)
    return next((n for n in sizes if share % n == 0 and step_bytes(recipe, n, world_size) <= room), 0)


def advice(recipe: Recipe, micro_batch: int, world_size: int, card_gb: float) -> str:
    """Says in a line what the recipe's micro-batch needs, and what would fit a card of `card_gb` GB."""
    try:
        return _advice(recipe, micro_batch, world_size, card_gb)
    except costs.NotKnown as unknown:
        return str(unknown)


def _advice(recipe: Recipe, micro_batch: int, world_size: int, card_gb: float) -> str:
    need = step_bytes(recipe, micro_batch, world_size) / 1e9
    fits = largest_micro_batch(recipe, world_size, card_gb * 1e9)
    line = f"micro-batch {micro_batch} needs about {need:.1f} GB of {card_gb:g}"
    if need > card_gb * (1 - RESERVE):
        depth = recipe.model.parts().depth
        again = recipe.model_copy(update={"train": recipe.train.model_copy(update={"recompute": depth})})
        fits_again = largest_micro_batch(again, world_size, card_gb * 1e9)
        remedies = [f"--set train.micro_batch={fits}"] if fits else []
        if step_bytes(again, micro_batch, world_size) <= card_gb * 1e9 * (1 - RESERVE):
            remedies.append(f"--set train.recompute={depth}")
        elif fits_again > fits:
            remedies.append(f"--set train.recompute={depth} --set train.micro_batch={fits_again}")
        what = " or ".join(remedies)
        return f"{line}, which is too much; " + (
            f"{what} fits" if what else f"not even {least_of(recipe)} would fit: take a larger card, or a smaller model"
        )
    return line if fits <= micro_batch else f"{line}; --set train.micro_batch={fits} would fit as well"


def _config(recipe: Recipe, classes: int = 1000) -> ModelConfig:
    return model_config(recipe.model, recipe.model.num_classes or classes)


def least_of(recipe: Recipe) -> str:
    """Says what a micro-batch holds at the least."""
    return "one image" if recipe.train.group == 1 else f"one group of {recipe.train.group} images"


def _bytes(recipe: Recipe) -> int:
    return 2 if recipe.train.precision == "bf16" else 4


def _states(optim: OptimSection) -> int:
    return (2 if optim.name == "adamw" else 1) + (optim.ema_decay > 0)
