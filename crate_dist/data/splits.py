"""The training and the validation split of a recipe, opened and held against it. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from crate_dist.config import CACHE_VARIABLE, DataSection, Recipe, RecipeError
from crate_dist.data.cache import locked, make_folder, unwritable
from crate_dist.data.identity import first_difference
from crate_dist.data.index import INDEX_JSON, INDEX_ROWS, Remote, ShardError, ShardIndex
from crate_dist.data.remote import Damaged, below, fetch, file_url


def open_splits(recipe: Recipe) -> tuple[ShardIndex, ShardIndex | None]:
    """The indexes of the training and validation split, the latter None where the recipe has none.

    Raises
    ------
    ShardError: a folder, an index or a shard is missing, or the splits do not belong together
    RecipeError: the recipe asks for what the splits do not have
    """
    root = recipe.data_root()
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
    if val is not None and (words := first_difference(train.classes, val.classes, "in the one", "in the other")):
        raise ShardError(f"{train.place} and {val.place} do not have the same classes in the same order: {words}")


def open_split(root: Path | str, split: str, data: DataSection) -> ShardIndex:
    """The index of one split below a folder, or below a URL, from which it is fetched. Raises ShardError.

    Of a URL the index alone is looked at: to ask for every shard would take minutes, and their digests are checked
    when they arrive.
    """
    if isinstance(root, Path):
        index = ShardIndex.load(root / split)
    else:
        remote = Remote(below(root, split), cache_folder(data), int(data.cache_gb * 1e9))
        index = ShardIndex.load(_fetched_index(remote), remote)
    index.check_rows()
    return index


def cache_folder(data: DataSection) -> Path:
    """Where this node keeps the shards of a URL. Raises ShardError when it is another user's."""
    chosen = data.cache_dir or os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    folder = Path(tempfile.gettempdir()) / f"crate-cache-{os.getuid()}"
    make_folder(folder, 0o700)
    if folder.stat().st_uid != os.getuid():
        raise ShardError(f"{folder} is another user's; give data.cache_dir or export {CACHE_VARIABLE}=DIR")
    return folder


def _fetched_index(remote: Remote) -> Path:
    """The folder in the cache that holds index.json as it is there now, and the rows that belong to it."""
    url = file_url(remote.url, INDEX_JSON)
    try:
        text = fetch(url, b"".join)
    except ShardError as error:
        remedy = "`python data_prep/index.py DIR` writes the index, which is to lie beside the shards"
        raise ShardError(f"{error}; {remedy}") from error
    try:
        digest = json.loads(text).get("rows_sha256")
    except (ValueError, AttributeError):
        raise ShardError(f"{url} is no index: it begins with {text[:40]!r}") from None
    folder = remote.cache / "indexes" / hashlib.sha256(remote.url.encode() + b"\0" + text).hexdigest()[:32]
    make_folder(folder)
    with locked(folder / "lock"):
        if not (folder / INDEX_JSON).is_file():
            fetch(file_url(remote.url, INDEX_ROWS), lambda chunks: _take_rows(chunks, folder, digest))
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


def _write(path: Path, chunks: Iterator[bytes]) -> None:
    """Whole or not at all; the caller holds the folder's lock."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        for chunk in chunks:
            try:
                file.write(chunk)
            except OSError as error:  # no failure of the server, which would be tried again
                raise unwritable(path.parent, error) from error
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _check_shards_are_there(index: ShardIndex) -> None:
    """Sizes alone, which costs one look per shard; data_prep/verify.py compares the digests."""
    for shard in index.shards:
        path = index.root / shard.name
        size = path.stat().st_size if path.is_file() else None
        if size != shard.bytes:
            found = "is missing" if size is None else f"has {size} bytes, its index says {shard.bytes}"
            raise ShardError(f"{path} {found}; `python data_prep/verify.py {index.root}` lists all shards that differ")
