"""Images in class folders, read where they lie: what is evaluated once needs no shards.

ImageNet's variants are published so. For training there are shards: a file per image is too slow on a shared disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from crate_dist.data.decode import IMAGE_SUFFIXES, MAX_BYTES, BadImage
from crate_dist.data.index import ShardError, ShardIndex
from crate_dist.data.reader import BadSample, ShardReader
from crate_dist.data.remote.prefetch import Plan

_ROW = np.dtype([("label", "<i4")])
_LISTING_THREADS = 16  # over a network listing is waiting
_SHOWN = 5


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder of class folders, by class and name.

    names: of the files below `root`, one for each row
    rows: structured array of shape (num_samples,), with the label of each
    classes: names of the folders, position = label: in order, and numbers in that of numbers; class_names: the same
    """

    root: Path
    names: Sequence[str]
    rows: np.ndarray
    classes: Sequence[str]

    @property
    def class_names(self) -> Sequence[str]:
        """The classes again: folders tell no words for them."""
        return self.classes

    @property
    def place(self) -> Path:
        """The folder, for people."""
        return self.root

    @property
    def num_samples(self) -> int:
        """Images in the whole folder."""
        return len(self.names)

    @property
    def num_classes(self) -> int:
        """Class folders."""
        return len(self.classes)

    @classmethod
    def load(cls, root: Path) -> ImageFolder:
        """Lists the images right in each class folder. Raises ShardError: no class folders, or one without images."""
        classes = class_folders(root)
        if not classes:
            raise ShardError(f"no class folders in {root}: expected {root}/<class>/<image>")
        with ThreadPoolExecutor(_LISTING_THREADS) as pool:
            listed = list(pool.map(partial(_images, root), classes))
        if empty := [name for name, images in zip(classes, listed, strict=True) if not images]:
            more = f" and {len(empty) - _SHOWN:,} more" if len(empty) > _SHOWN else ""
            raise ShardError(
                f"no image in {', '.join(empty[:_SHOWN])}{more} of {root}: fill what is incomplete, or remove what is "
                "no class"
            )
        rows = np.empty(sum(map(len, listed)), dtype=_ROW)
        rows["label"] = np.repeat(np.arange(len(classes)), [len(images) for images in listed])
        return cls(root, [name for images in listed for name in images], rows, classes)


Indexed = ShardIndex | ImageFolder
"""What can be evaluated: a split of shards, or a folder."""


class FolderReader:
    """A reader of single images of a folder, as ShardReader is of shards."""

    def __init__(self, index: ImageFolder) -> None:
        self.index = index

    def at(self, number: int) -> None:
        """Does nothing: no image needs to be fetched ahead."""

    def read(self, sample: int) -> bytes:
        """Reads an image. Raises BadImage for more bytes than one may have, ShardError when it cannot be read."""
        path = self.index.root / self.index.names[sample]
        try:
            if (size := path.stat().st_size) > MAX_BYTES:
                raise BadImage(f"{size:,} bytes, more than the {MAX_BYTES:,} that an image may have")
            return path.read_bytes()
        except OSError as error:
            raise ShardError(f"cannot read {path}: {error.strerror}") from error

    def name(self, sample: int) -> str:
        """Returns the name of an image's file."""
        return self.index.names[sample].rpartition("/")[2]

    def describe(self, sample: int, reason: str) -> BadSample:
        """Names an image that does not decode by its class folder and its file."""
        folder, _, name = self.index.names[sample].rpartition("/")
        return BadSample(folder, name, reason)


def open_reader(index: Indexed, plan: Plan | None = None) -> ShardReader | FolderReader:
    """Returns what reads the samples of `index`. plan: as ShardReader takes it"""
    return FolderReader(index) if isinstance(index, ImageFolder) else ShardReader(index, plan)


def class_folders(root: Path) -> list[str]:
    """Returns the names of the folders in a folder but hidden ones, in order. Raises ShardError."""
    try:
        with os.scandir(root) as entries:
            names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    except OSError as error:
        raise ShardError(f"cannot read the folder {root}: {error.strerror}") from error
    return in_order(names)


def in_order(names: Iterable[str]) -> list[str]:
    """Sorts names of classes, numbers as such: 2 before 10."""
    return sorted(names, key=lambda name: (int(name), name) if name.isdecimal() else (-1, name))


def _images(root: Path, folder: str) -> list[str]:
    try:
        with os.scandir(root / folder) as entries:
            return sorted(
                f"{folder}/{entry.name}"
                for entry in entries
                if entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.name[0] != "." and entry.is_file()
            )
    except OSError as error:
        raise ShardError(f"cannot read the folder {root / folder}: {error.strerror}") from error
