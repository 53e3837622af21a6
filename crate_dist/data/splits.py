"""The training and the validation split of a recipe, opened and held against it. Imports no torch."""

from __future__ import annotations

from crate_dist.config import Recipe, RecipeError
from crate_dist.data.index import ShardError, ShardIndex


def open_splits(recipe: Recipe) -> tuple[ShardIndex, ShardIndex | None]:
    """The indexes of the training and validation split, the latter None where the recipe has none.

    Raises
    ------
    ShardError: a folder, an index or a shard is missing, or the splits do not belong together
    RecipeError: the recipe asks for what the splits do not have
    """
    root = recipe.data_root()
    train = ShardIndex.load(root / recipe.data.train_split)
    val = ShardIndex.load(root / recipe.data.val_split) if recipe.data.val_split else None
    if train.num_samples < recipe.train.global_batch:
        raise RecipeError(
            f"{train.root} has {train.num_samples} samples, fewer than one global batch of "
            f"{recipe.train.global_batch}; --set train.global_batch={train.num_samples} or less would do"
        )
    if val is not None and list(val.classes) != list(train.classes):
        raise ShardError(f"{train.root} and {val.root} do not have the same classes in the same order")
    if recipe.model.num_classes is not None and recipe.model.num_classes < train.num_classes:
        raise RecipeError(
            f"{train.root} has {train.num_classes} classes, more than model.num_classes = {recipe.model.num_classes}; "
            f"leave it out, or give {train.num_classes} or more"
        )
    for split in (train, val):
        if split is not None:
            _check_shards_are_there(split)
    return train, val


def _check_shards_are_there(index: ShardIndex) -> None:
    """Sizes alone, which costs one look per shard; data_prep/verify.py compares the digests."""
    for shard in index.shards:
        path = index.root / shard.name
        size = path.stat().st_size if path.is_file() else None
        if size != shard.bytes:
            found = "is missing" if size is None else f"has {size} bytes, its index says {shard.bytes}"
            raise ShardError(f"{path} {found}; `python data_prep/verify.py {index.root}` lists all shards that differ")
