"""Sources that are folders: one folder per class, images anywhere below it.

What a folder holds is judged once, here, before anything is written. Hidden files and files without an image's
extension are passed over and counted. A thing that is called like an image and is no readable file (a folder, a
dangling link, a pipe) is an error, or with `skip_bad` left out and listed. Symbolic links are followed within the
source; one that leads out of it is an error unless `follow_links` is set, so that converting a folder from elsewhere
does not quietly collect files from all over the machine.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from crate_dist.data.index import ShardError
from crate_dist.data.order import Int64, hash64
from crate_dist.prep.program import explained
from crate_dist.prep.samples import ImageRef, Samples, is_image_name

_LISTING_THREADS = 16  # listing a million files over a network is waiting, not computing
_HELD_OUT = 0x686F6C64  # keeps the choice of held-out images apart from the shuffle
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ListOptions:
    """The options of listing a source, called as on the command line."""

    follow_links: bool = False
    skip_bad: bool = False


@dataclass(frozen=True)
class Split:
    """The images of one split, in an order that depends on their names alone.

    ignored: files that were passed over; unreadable: names of images that were left out at the user's wish
    """

    samples: Samples
    ignored: int = 0
    unreadable: Sequence[str] = ()

    @classmethod
    def joined(cls, parts: Sequence[Split]) -> Split:
        """Returns all parts after each other as one split; they come from the same root."""
        return cls(
            Samples.concatenate([part.samples for part in parts]),
            sum(part.ignored for part in parts),
            [name for part in parts for name in part.unreadable],
        )


@dataclass(frozen=True)
class Source:
    """All splits that there are to convert, and the classes that they share.

    layout: for people; classes: ids, position = label, shared by all splits; class_names: for people, same length
    notes: what the user should know before the conversion starts
    """

    root: Path
    layout: str
    classes: Sequence[str]
    class_names: Sequence[str]
    splits: Mapping[str, Split]
    notes: Sequence[str] = field(default_factory=tuple)


def class_folders(folder: Path) -> list[str]:
    """Lists the folders in a folder by name, but for hidden ones, sorted. Raises ShardError when it cannot be read."""
    with explained(f"cannot read the folder {folder}"), os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def list_classes(
    root: Path, folder: Path, classes: Sequence[str], labels: Mapping[str, int], options: ListOptions
) -> Split:
    """Lists all images below folder/<class> for each of `classes` by label and name; names start from `root`.

    Raises ShardError: a class without an image, something that cannot be read, a link that leads out of `root`.
    """

    def one(name: str) -> Split:
        found, ignored, unreadable = list_images(root, folder / name, options)
        return Split(Samples.collect(root, found, labels[name]), ignored, unreadable)

    ordered = sorted(classes, key=labels.__getitem__)
    listings = list(threaded_map(one, ordered, f"listing {folder.name}", "class"))
    empty = [name for name, listing in zip(ordered, listings, strict=True) if not len(listing.samples)]
    if empty:
        raise ShardError(
            f"{first_few(empty)}: no image in {'this class folder' if len(empty) == 1 else 'these class folders'} of "
            f"{folder}; remove what is no class, or fill what is incomplete"
        )
    return Split.joined(listings)


def list_images(root: Path, folder: Path, options: ListOptions) -> tuple[list[ImageRef], int, list[str]]:
    """Returns (images anywhere below `folder` by name, number of files passed over, names of unreadable images)."""
    walk = _Walk(os.fspath(root), os.path.realpath(root), options)
    walk.descend(os.fspath(folder), (walk.check_link(os.fspath(folder)),))
    return sorted(walk.found), walk.ignored, sorted(walk.unreadable)


def image_folder(root: Path, options: ListOptions, val_fraction: float = 0.0, seed: int = 0) -> Source:
    """Lists a tree of class folders, or of splits that hold class folders.

    `train` is a split when it holds folders itself; beside it `val`, `valid`, `validation` or `test` is the validation
    split, and a `test` beside one of the others stays a split of its own. Where there is no validation split,
    `val_fraction` of every class is held out, as hold_out does it.

    Raises ShardError that says what was found instead.
    """
    top = class_folders(root)
    splits = _split_folders(root, top)
    if "val" in splits and val_fraction:
        raise ShardError(f"--val-fraction: {root} has a validation split already, in {splits['val'].name}/")
    train = splits["train"]
    classes = class_folders(train)
    if not classes:
        raise ShardError(
            f"no class folders in {train}: expected DIR/<class>/<image> or DIR/train/<class>/<image>; "
            f"{contents_of(train)}"
        )
    labels = {name: label for label, name in enumerate(classes)}
    listed = {"train": list_classes(root, train, classes, labels, options)}
    notes = [f"{name}/ is not read: beside train/ only splits are" for name in _not_splits(top, splits, root)]
    for name, folder in splits.items():
        if name == "train":
            continue
        present = class_folders(folder)
        if unknown := [wrong for wrong in present if wrong not in labels]:
            raise ShardError(
                f"{folder} has classes that {train} has not: {first_few(unknown)}; labels come from {train.name}/"
            )
        if missing := len(classes) - len(present):
            notes.append(f"{folder.name}/ has no folder for {missing} of the {len(classes)} classes")
        listed[name] = list_classes(root, folder, present, labels, options)
    if val_fraction:
        listed["train"], listed["val"] = hold_out(listed["train"], val_fraction, seed)
    elif "val" not in listed:
        notes.append("no validation split: --val-fraction 0.05 would hold out 5 % of every class")
    layout = "split folders of class folders" if train != root else "class folders"
    return Source(root, layout, classes, classes, listed, notes)


def hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Returns (rest, held out): a seeded share of every class, of two images at least one, and never all of them.

    Raises ShardError when no class has two images.
    """
    counts = np.bincount(split.samples.labels)
    if counts.max() < 2:
        raise ShardError("--val-fraction: no class has more than one image, there is none to hold out")
    share = np.clip(np.rint(counts * fraction).astype(np.int64), np.minimum(1, counts - 1), counts - 1)
    return _held_out(split, counts, share, seed)


def hold_out_each(split: Split, per_class: int, seed: int) -> tuple[Split, Split]:
    """Returns (rest, held out): so many images of every class, chosen by the seed, and never more than half of one.

    Raises ShardError when no class has two images.
    """
    counts = np.bincount(split.samples.labels)
    if counts.max() < 2:
        raise ShardError("--val-per-class: no class has more than one image, there is none to hold out")
    return _held_out(split, counts, np.minimum(per_class, counts // 2), seed)


def _held_out(split: Split, counts: Int64, share: Int64, seed: int) -> tuple[Split, Split]:
    samples = split.samples
    by_class = np.lexsort((hash64(seed, _HELD_OUT, np.arange(len(samples))), samples.labels))
    rank = np.arange(len(samples)) - np.repeat(np.cumsum(counts) - counts, counts)
    held = rank < np.repeat(share, counts)
    rest = Split(samples.take(np.sort(by_class[~held])), split.ignored, split.unreadable)
    return rest, Split(samples.take(np.sort(by_class[held])))


def threaded_map(function: Callable[[Item], Result], items: Sequence[Item], what: str, unit: str) -> Iterator[Result]:
    """Yields results in the order of `items`, with a progress bar; the first error ends it."""
    pool = ThreadPoolExecutor(_LISTING_THREADS)
    try:
        yield from tqdm(
            pool.map(function, items), what, len(items), unit=f" {unit}", leave=False, disable=None, delay=1
        )
    finally:
        pool.shutdown(cancel_futures=True)


def contents_of(folder: Path) -> str:
    """Says what a folder holds, for a message that it is not what was expected."""
    if not folder.is_dir():
        return "it is a file of another name"
    names = sorted(name + ("/" if (folder / name).is_dir() else "") for name in os.listdir(folder))
    return f"found {first_few(names)}" if names else "the folder is empty"


def first_few(names: Iterable[str], most: int = 5) -> str:
    """Says the first few names and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _split_folders(root: Path, top: Sequence[str]) -> dict[str, Path]:
    if "train" not in top or not class_folders(root / "train"):
        return {"train": root}
    splits = {"train": root / "train"}
    given = [name for name in ("val", "valid", "validation") if name in top]
    if len(given) > 1:
        raise ShardError(f"{root} has several validation splits: {', '.join(given)}; leave one")
    if given:
        splits["val"] = root / given[0]
    if "test" in top:
        splits["test" if given else "val"] = root / "test"
    return splits


def _not_splits(top: Sequence[str], splits: Mapping[str, Path], root: Path) -> list[str]:
    return [] if splits["train"] == root else [name for name in top if root / name not in splits.values()]


class _Walk:
    def __init__(self, root: str, real_root: str, options: ListOptions) -> None:
        self.root, self.real_root, self.options = root, real_root, options
        self.prefix = len(os.path.join(root, ""))
        self.found: list[ImageRef] = []
        self.ignored = 0
        self.unreadable: list[str] = []

    def descend(self, folder: str, above: tuple[str, ...]) -> None:
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    self._visit(entry, above)
        except OSError as error:
            raise ShardError(f"cannot read {error.filename or folder}: {error.strerror}") from error

    def check_link(self, path: str) -> str:
        target = os.path.realpath(path)
        if not self.options.follow_links and os.path.commonpath((target, self.real_root)) != self.real_root:
            raise ShardError(
                f"{path} leads by a link out of {self.root}, to {target}; --follow-links takes what such links lead to"
            )
        return target

    def _visit(self, entry: os.DirEntry[str], above: tuple[str, ...]) -> None:
        if entry.name.startswith("."):
            self.ignored += not entry.is_dir(follow_symlinks=False)
            return
        if entry.is_dir() and not is_image_name(entry.name):
            target = self.check_link(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
            if target in above:
                raise ShardError(f"{entry.path} is a link to a folder that it stands in, {target}: remove it")
            self.descend(entry.path, (*above, target))
        elif not is_image_name(entry.name):
            self.ignored += 1
        elif (size := self._size_of_image(entry)) is not None:
            self.found.append(ImageRef(entry.path[self.prefix :], size))

    def _size_of_image(self, entry: os.DirEntry[str]) -> int | None:
        try:
            if entry.is_symlink():
                self.check_link(entry.path)
            status = entry.stat()
            if stat.S_ISREG(status.st_mode):
                return status.st_size
            problem = "a folder" if entry.is_dir() else "neither a file nor a folder"
        except OSError as error:
            problem = "a link to nothing" if entry.is_symlink() else (error.strerror or str(error))
        if not self.options.skip_bad:
            raise ShardError(
                f"{entry.path} is called like an image and is {problem}; "
                "remove it, or leave out and list such images with --skip-bad"
            )
        self.unreadable.append(f"{entry.path[self.prefix :]}: {problem}")
        return None
