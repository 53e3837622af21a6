"""The places of images before they are in shards: cheap to hold by the million, cheap to cut.

An image is a file below a folder, or a stretch of bytes in a tar that is read in place. All may lie in one tar, or each
class in its own.
"""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from crate_dist.data.decode import IMAGE_SUFFIXES
from crate_dist.data.index import ShardError
from crate_dist.data.order import Int64
from crate_dist.prep.program import explained
from crate_dist.prep.tar import MAX_IMAGE_BYTES, walk_tar

_WHOLE_FILE = -1
_NO_ARCHIVE = -1
_OPEN_ARCHIVES = 64


class ImageRef(NamedTuple):
    """An image of a source. name: path below the root, or name in the archive; size, offset: bytes"""

    name: str
    size: int
    offset: int = _WHOLE_FILE


@dataclass(frozen=True, eq=False)
class Samples:
    """Images with labels, in arrays of one entry per image.

    root: folder that the names start from; archives: tars that hold images
    inside: int32, in which of the archives, -1 for files
    names: all names, laid end to end; ends: int64, where each one ends
    sizes: int64 bytes; offsets: int64, in the archive, -1 for files; labels: int32
    """

    root: str
    archives: Sequence[str]
    inside: np.ndarray
    names: bytes
    ends: np.ndarray
    sizes: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray

    @classmethod
    def collect(
        cls, root: Path, found: Iterable[ImageRef], label: int | Sequence[int], archive: Path | None = None
    ) -> Samples:
        """Collects images in their order, all with the same label or each with its own."""
        entries = list(found)
        names = [os.fsencode(entry.name) for entry in entries]
        return cls(
            str(root),
            [str(archive)] if archive else [],
            np.full(len(entries), 0 if archive else _NO_ARCHIVE, dtype=np.int32),
            b"".join(names),
            np.cumsum([len(name) for name in names], dtype=np.int64),
            np.array([entry.size for entry in entries], dtype=np.int64),
            np.array([entry.offset for entry in entries], dtype=np.int64),
            np.broadcast_to(np.asarray(label, dtype=np.int32), len(entries)).copy(),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Samples]) -> Samples:
        """Returns all parts after each other; they come from the same root."""
        shifts = np.cumsum([0, *(len(part.names) for part in parts[:-1])])
        number = {path: i for i, path in enumerate(dict.fromkeys(path for part in parts for path in part.archives))}
        inside = []
        for part in parts:  # the last entry is where -1 leads
            renumbered = np.array([*(number[path] for path in part.archives), _NO_ARCHIVE], dtype=np.int32)
            inside.append(renumbered[part.inside])
        return cls(
            parts[0].root,
            list(number),
            np.concatenate(inside),
            b"".join(part.names for part in parts),
            np.concatenate([part.ends + shift for part, shift in zip(parts, shifts, strict=True)]),
            np.concatenate([part.sizes for part in parts]),
            np.concatenate([part.offsets for part in parts]),
            np.concatenate([part.labels for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.ends)

    def take(self, ids: Int64) -> Samples:
        """Returns the images with these numbers, in this order."""
        names = io.BytesIO()  # a list of ten million names would take more room than all else
        for i in ids.tolist():
            names.write(self._raw_name(i))
        ends = np.cumsum(self.ends[ids] - np.where(ids > 0, self.ends[ids - 1], 0), dtype=np.int64)
        used, inside = np.unique(self.inside[ids], return_inverse=True)
        archives = [self.archives[i] for i in used if i != _NO_ARCHIVE]
        inside = (inside - np.count_nonzero(used == _NO_ARCHIVE)).astype(np.int32)
        columns = self.sizes[ids], self.offsets[ids], self.labels[ids]
        return Samples(self.root, archives, inside, names.getvalue(), ends, *columns)

    def name(self, i: int) -> str:
        """Returns the path of an image below the root, or its name in the archive."""
        return os.fsdecode(self._raw_name(i))

    def describe(self, i: int) -> str:
        """Says where an image lies, for messages."""
        archive = self._archive(i)
        return f"{archive}: {self.name(i)}" if archive else os.path.join(self.root, self.name(i))

    def read(self, i: int) -> bytes:
        """Reads the bytes of an image. Raises ShardError when they cannot be read or are not those that were listed."""
        with explained(f"cannot read {self.describe(i)}"):
            if archive := self._archive(i):
                data = os.pread(_open_archive(archive).fileno(), int(self.sizes[i]), int(self.offsets[i]))
            else:
                data = _read_file(os.path.join(self.root, self.name(i)))
        if len(data) != self.sizes[i]:
            raise ShardError(
                f"{self.describe(i)} has {len(data)} bytes and had {self.sizes[i]} when it was listed: "
                "the source changes while it is converted"
            )
        return data

    def digest(self) -> str:
        """Returns the SHA-256 of all names, sizes and labels; where the source lies is no part of it."""
        digest = hashlib.sha256(self.names)
        for array in (self.ends, self.sizes, self.labels):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def _archive(self, i: int) -> str | None:
        return None if self.inside[i] == _NO_ARCHIVE else self.archives[self.inside[i]]

    def _raw_name(self, i: int) -> bytes:
        return self.names[int(self.ends[i - 1]) if i else 0 : int(self.ends[i])]


def list_archive(
    path: Path, start: int = 0, size: int | None = None, skip_bad: bool = False
) -> tuple[list[ImageRef], int, list[str]]:
    """Returns (images in a tar sorted by name, number of other files, names of unreadable images).

    start, size: where the tar lies in the file. Raises ShardError: a tar that is cut off, damaged or compressed; a name
    of an image that comes twice, or, unless `skip_bad`, that a symbolic link has, or whatever else is no file.
    """
    found: dict[str, ImageRef] = {}
    others, unreadable = 0, []
    for member in walk_tar(path, start, size):
        name = posixpath.normpath(member.name)
        if not is_image_name(name):
            others += 1
        elif name in found:
            raise ShardError(f"{path}: {member.name} comes twice; unpack the archive, and look which of both is meant")
        elif not member.problem:
            found[name] = ImageRef(member.name, member.size, member.offset)
        elif skip_bad:
            unreadable.append(f"{member.name}: {member.problem}")
        else:
            raise ShardError(
                f"{path}: {member.name} is called like an image and is {member.problem}; unpack the archive, which "
                "follows links, or leave out and list such images with --skip-bad"
            )
    return sorted(found.values()), others, sorted(unreadable)


def is_image_name(name: str) -> bool:
    """Tells whether a file's name has the suffix of an image and is not hidden."""
    stem, extension = os.path.splitext(os.path.basename(name))
    return not stem.startswith(".") and extension.lower() in IMAGE_SUFFIXES


def _read_file(path: str) -> bytes:
    # A FIFO would block an ordinary open for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        if status.st_size > MAX_IMAGE_BYTES:
            raise OSError(f"{status.st_size} bytes, more than an image may have")
        parts = []
        while part := os.read(descriptor, max(status.st_size, 1)):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(descriptor)


@lru_cache(maxsize=_OPEN_ARCHIVES)
def _open_archive(path: str) -> BinaryIO:
    return open(path, "rb", buffering=0)  # closed when the cache forgets it
