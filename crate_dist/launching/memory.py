"""Estimates from shapes the GPU memory of a training step. Imports no torch: a login node asks it.

Counted is what autograd keeps of a forward pass (per layer six or seven tensors of the size of the tokens), what a
backward pass has in hand at a time, and the state of ZeRO-2. A test holds the first against what torch really keeps.
Not counted is what an allocator leaves unused between its blocks; `RESERVE` stands for it and for the context of CUDA.
"""

from __future__ import annotations

from crate_dist.config import OptimSection, Recipe
from crate_dist.models.sizes import ista_in_one_product

KEPT_PER_LAYER = 6
"""Tensors of the tokens' size: input, normalised input, projections, attention's output, its sum with the input, that
normalised. In two products, ISTA's residual is one more; in one, its matrix, of the weights' size."""

RESIDUALS = 2
"""Of these, those that autocast leaves in fp32: a layer's input, and its sum with attention's output."""

ROUNDED = 4
"""Copies in bf16 of a layer's matrices that autocast makes and keeps: of ISTA's dictionary, two."""

IN_HAND = 6
"""Tensors of the tokens' size that a layer's backward pass holds at a time, beside those."""

RESERVE = 0.12
"""Share of a card's memory that is left alone."""


def parameters(recipe: Recipe, classes: int = 1000) -> int:
    """Counts the weights of the recipe's model."""
    dims, patch, tokens = recipe.model.parts(), _patch_values(recipe), _tokens(recipe)
    d = dims.dim
    layer = 2 * d * d + (d * d + d if dims.heads > 1 else 0) + 4 * d
    embedding = 2 * patch + patch * d + 3 * d + tokens * d + d
    return dims.depth * layer + embedding + 2 * d + (d + 1) * (recipe.model.num_classes or classes)


def kept_bytes(recipe: Recipe, images: int) -> int:
    """Counts the bytes that autograd keeps of `images` images from the forward pass to the backward pass."""
    dims, tokens, size = recipe.model.parts(), _tokens(recipe) * images, _bytes(recipe)
    of_products = 4 if recipe.train.precision == "fp32" else 2
    values, matrix = tokens * dims.dim, dims.dim**2 * of_products
    per_layer = values * (RESIDUALS * size + (_kept_per_layer(recipe, images) - RESIDUALS) * of_products)
    per_layer += (4 + dims.heads) * tokens * 4
    if ista_in_one_product(tokens, dims.dim):
        per_layer += matrix
    patch, classes = _patch_values(recipe), recipe.model.num_classes or 1000
    embedding = (tokens - images) * (patch * (size + of_products) + dims.dim * of_products)
    if recipe.train.precision == "autocast":
        per_layer += ROUNDED * matrix
        embedding += (patch + classes) * dims.dim * of_products  # the matrices of embedding and head
    again = min(recipe.train.recompute, dims.depth)
    return (dims.depth - again) * per_layer + again * values * size + embedding


def step_bytes(recipe: Recipe, micro_batch: int, world_size: int) -> int:
    """Counts the most bytes that a rank of `world_size` needs at a time."""
    dims, size = recipe.model.parts(), _bytes(recipe)
    in_hand = IN_HAND + (_kept_per_layer(recipe, micro_batch) if recipe.train.recompute else 0)
    passing = kept_bytes(recipe, micro_batch) + in_hand * micro_batch * _tokens(recipe) * dims.dim * size
    arriving = parameters(recipe) * size / 8  # gradients of the bucket that the backward pass fills
    return round(passing + arriving + state_bytes(recipe, world_size))


def state_bytes(recipe: Recipe, world_size: int) -> float:
    """Counts the bytes that a rank holds from one step to the next.

    All weights, and a flat vector of all gradients; of this rank's part, in fp32, the summed gradients, the master
    weights, what the optimizer keeps, and the average of the weights where the recipe has one.
    """
    part = 4 + 4 + 4 * _states(recipe.optim)
    return parameters(recipe) * (2 * _bytes(recipe) + part / world_size)


def checkpoint_bytes(recipe: Recipe, classes: int = 1000) -> int:
    """Counts the bytes of a checkpoint's tensors: master weights, what the optimizer keeps, their average; in fp32."""
    return parameters(recipe, classes) * 4 * (1 + _states(recipe.optim))


def largest_micro_batch(recipe: Recipe, world_size: int, card_bytes: float) -> int:
    """Finds the largest micro-batch that fits a card and divides a rank's share of the global batch; 0: none."""
    share = recipe.train.global_batch // world_size
    room = card_bytes * (1 - RESERVE)
    return next((n for n in range(share, 0, -1) if share % n == 0 and step_bytes(recipe, n, world_size) <= room), 0)


def advice(recipe: Recipe, micro_batch: int, world_size: int, card_gb: float) -> str:
    """Says in a line what the recipe's micro-batch needs, and what would fit a card of `card_gb` GB."""
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
            f"{what} fits" if what else "not even one image would fit: take a larger card, or a smaller model"
        )
    return line if fits <= micro_batch else f"{line}; --set train.micro_batch={fits} would fit as well"


def _kept_per_layer(recipe: Recipe, images: int) -> int:
    return KEPT_PER_LAYER + (not ista_in_one_product(images * _tokens(recipe), recipe.model.parts().dim))


def _patch_values(recipe: Recipe) -> int:
    return 3 * recipe.model.patch_size**2


def _tokens(recipe: Recipe) -> int:
    return (recipe.model.image_size // recipe.model.patch_size) ** 2 + 1


def _bytes(recipe: Recipe) -> int:
    return 2 if recipe.train.precision == "bf16" else 4


def _states(optim: OptimSection) -> int:
    return (2 if optim.name == "adamw" else 1) + (optim.ema_decay > 0)
