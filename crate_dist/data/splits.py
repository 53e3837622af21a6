"""Opens the training and the validation split of a recipe, and holds them against it. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from crate_dist.config import DataSection, Recipe, RecipeError
from crate_dist.data.identity import first_class_difference
from crate_dist.data.index import INDEX_JSON, INDEX_ROWS, Remote, ShardError, ShardIndex
from crate_dist.data.remote.cache import locked
from crate_dist.data.remote.cache_folder import cache_folder, make_subfolder, open_file, unwritable
from crate_dist.data.remote.fetch import Damaged, below, fetch
from crate_dist.locations import redacted

logger = logging.getLogger(__name__)

Splits = tuple[ShardIndex, ShardIndex | None]
"""The training split, and the validation split."""


def open_splits(recipe: Recipe) -> Splits:
    """Opens the indexes of the training and validation split, the latter None where the recipe has none.

    Raises
    ------
    ShardError: a folder, an index or a shard is missing, or the splits do not belong together
    RecipeError: the recipe asks for what the splits do not have
    """
    root = recipe.data.find_root()
    train = open_split(root, recipe.data.train_split, recipe.data)
    wanted = root / recipe.data.val_split if isinstance(root, Path) and recipe.data.val_split else None
    if wanted and not wanted.is_dir():
        raise ShardError(
            f"no folder {wanted} to evaluate on; --set data.val_split= trains without evaluation; "
            "data_prep/image_folder.py --val-fraction 0.05 would hold images out for one"
        )
    val = open_split(root, recipe.data.val_split, recipe.data) if recipe.data.val_split else None
    if train.num_samples < recipe.train.global_batch:
        raise RecipeError(
            f"{train.place} has {train.num_samples} samples, fewer than one global batch of "
            f"{recipe.train.global_batch}; --set train.global_batch={train.num_samples} or less would do"
        )
    check_same_classes(train, val)
    if recipe.model.num_classes is not None and recipe.model.num_classes < train.num_classes:
        raise RecipeError(
            f"{train.place} has {train.num_classes} classes, more than model.num_classes = "
            f"{recipe.model.num_classes}; leave it out, or give {train.num_classes} or more"
        )
    for split in (train, val):
        if split is not None and split.remote is None:
            _check_shards_are_there(split)
    return train, val


def check_same_classes(train: ShardIndex, val: ShardIndex | None) -> None:
    """Raises ShardError where two splits do not have the same classes in the same order, and says where they part."""
    if val is not None and (words := first_class_difference(train.classes, val.classes, "in the one", "in the other")):
        raise ShardError(
            f"{train.place} and {val.place} do not have the same classes in the same order: {words}; convert both from "
            "one source, or, if the same are only called otherwise, `data_prep/index.py DIR --classes FILE` names them"
        )


def open_split(given: Path | str | None, split: str, data: DataSection) -> ShardIndex:
    """Opens the index of one split below a folder, or below a URL, from which it is fetched.

    given: as DataSection.find_root takes it. Raises ShardError, and RecipeError where there is no root.
    Of a URL the index alone is looked at: to ask for every shard would take minutes, and their digests are checked
    when they arrive.
    """
    root = data.find_root(given)
    if isinstance(root, Path):
        return _checked(ShardIndex.load(root / split))
    remote = Remote(below(root, split), cache_folder(data), int(data.cache_gb * 1e9))
    folder = _fetched_index(remote)
    try:
        return _checked(ShardIndex.load(folder, remote))
    except ShardError as error:
        logger.warning("what the cache holds is fetched again: %s", str(error).partition("; `")[0])
    return _checked(ShardIndex.load(_fetched_index(remote, again=True), remote))


def _checked(index: ShardIndex) -> ShardIndex:
    index.check_rows()
    return index


def _fetched_index(remote: Remote, again: bool = False) -> Path:
    """Returns the folder in the cache with index.json as it is there now, and the rows that belong to it.

    again: what is cached is not to be believed
    """
    try:
        text = fetch(remote.url, INDEX_JSON, b"".join)
    except ShardError as error:
        remedy = "where there are shards without an index, `python data_prep/index.py DIR` writes it beside them"
        raise ShardError(f"{error}; look at the address, and at what serves it; {remedy}") from error
    try:
        digest = json.loads(text).get("rows_sha256")
    except (ValueError, AttributeError, RecursionError):
        raise ShardError(f"{INDEX_JSON} of {redacted(remote.url)} is no index: it begins with {text[:40]!r}") from None
    name = hashlib.sha256(remote.url.encode() + b"\0" + text).hexdigest()[:32]
    folder = make_subfolder(remote.cache, "indexes", name)
    with locked(folder / "lock"):
        if again or _cached(folder / INDEX_JSON) != text:
            fetch(remote.url, INDEX_ROWS, lambda chunks: _take_rows(chunks, folder, digest))
            _write(folder / INDEX_JSON, iter([text]))
    return folder


def _take_rows(chunks: Iterator[bytes], folder: Path, digest: str | None) -> None:
    hashed = hashlib.sha256()

    def passing() -> Iterator[bytes]:
        for chunk in chunks:
            hashed.update(chunk)
            yield chunk
        if digest is not None and hashed.hexdigest() != digest:
            raise Damaged(f"it does not belong to the {INDEX_JSON} beside it, or changed on the way")

    _write(folder / INDEX_ROWS, passing())


def _cached(path: Path) -> bytes | None:
    try:
        with os.fdopen(open_file(path, os.O_RDONLY), "rb") as file:
            return file.read()
    except OSError:  # not there, not to be read, or a link, which is not followed: to be written again
        return None


def _write(path: Path, chunks: Iterator[bytes]) -> None:
    """Writes a file whole or not at all, and follows no link. The caller holds the folder's lock."""
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    with os.fdopen(open_file(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
        for chunk in chunks:
            try:
                file.write(chunk)
            except OSError as error:  # no failure of the server, which would be tried again
                raise unwritable(path.parent, error) from error
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _check_shards_are_there(index: ShardIndex) -> None:
    """Compares sizes alone, at one look per shard; data_prep/verify.py compares the digests."""
    for shard in index.shards:
        path = index.root / shard.name
        size = path.stat().st_size if path.is_file() else None
        if size != shard.bytes:
            found = "is missing" if size is None else f"has {size} bytes, its index says {shard.bytes}"
            raise ShardError(f"{path} {found}; `python data_prep/verify.py {index.root}` lists all shards that differ")
