"""Reads what a tar holds from its headers alone: nothing is ever unpacked to disk, no path in it is followed.

Serves the shards of this project, WebDataset shards that others made (ustar, GNU long names, pax headers), and the
archives that ImageNet comes in, also nested ones, whose members are located inside the outer file.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from crate_dist.data.decode import IMAGE_SUFFIXES
from crate_dist.data.index import ROW, Shard, ShardError, checksum
from crate_dist.prep.program import explained

MAX_CLASSES = 1_000_000
"""A larger label is taken for a mistake where no list of classes says otherwise."""
MAX_IMAGE_BYTES = 2**31 - 1
"""The largest size that the index has room for."""
_HEADERS = 4096
_MAX_LABEL_BYTES = 16 * 2**20
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_KEY_AND_SUFFIX = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # as webdataset splits names


class Member(NamedTuple):
    """A file in a tar: offset of its first byte in the outermost file, size in bytes.

    problem: what it is that cannot be read, as "a symbolic link to x"; nothing for a file
    """

    name: str
    offset: int
    size: int
    problem: str = ""


@dataclass(frozen=True)
class ShardScan:
    """A shard as it lies on disk; rows: structured array of shape (samples,) and dtype ROW."""

    shard: Shard
    rows: np.ndarray


@dataclass(frozen=True)
class LabelRule:
    """The place of a sample's label: in its `.cls` file, or under a key of its `.json` file (`meta.label`)."""

    json_key: str | None = None

    @classmethod
    def parse(cls, text: str) -> LabelRule:
        """Reads `cls` or `json:KEY`. Raises ValueError."""
        kind, _, key = text.partition(":")
        if text == "cls":
            return cls()
        if kind == "json" and key:
            return cls(key)
        raise ValueError(f"{text!r}: a label is read from `cls` or from `json:KEY`, for instance json:label")

    def __str__(self) -> str:
        return f"json:{self.json_key}" if self.json_key else "cls"

    @property
    def suffix(self) -> str:
        """The suffix of the file that holds the label."""
        return "json" if self.json_key else "cls"

    def read(self, data: bytes) -> int:
        """Reads the label in the bytes of that file. Raises ValueError with what stands there instead of an integer."""
        if self.json_key is None:
            text = data[:80].decode("utf-8", "replace").strip()
            if len(data) > 80 or not re.fullmatch(r"[+-]?[0-9]+", text):
                raise ValueError(f"the label is not an integer but {text!r}")
            return int(text)
        value: Any = json.loads(data)
        for part in self.json_key.split("."):
            if not isinstance(value, dict) or part not in value:
                known = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
                raise ValueError(f"no key {self.json_key!r} in its .json, which has: {known}")
            value = value[part]
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"the label is not an integer but {value!r}")
        return value


def walk_tar(path: Path, start: int = 0, size: int | None = None) -> Iterator[Member]:
    """Yields all but the folders of a plain tar, in their order, or of a tar that lies at `start` in another one.

    A hard link has the bytes of the earlier member that it names, as when unpacked. What is neither that nor a regular
    file comes with its `problem`, so that nobody passes over it unawares. Raises ShardError when the tar is compressed,
    damaged or cut off, or holds a name that leads out of it.
    """
    files: dict[str, Member] = {}
    # A parallel file system asks for a buffer of megabytes, and would read all images for their headers.
    with explained(f"cannot read {path}"), path.open("rb", buffering=_HEADERS) as file:
        end = os.fstat(file.fileno()).st_size if size is None else start + size
        for info in _walk(file, path, start, end):
            if info.isdir():
                continue
            member = Member(info.name, info.offset_data, info.size)
            if info.islnk() and (target := files.get(posixpath.normpath(info.linkname))):
                member = target._replace(name=info.name)
            elif not info.isreg():
                member = Member(info.name, 0, 0, _kind(info))
            files[posixpath.normpath(info.name)] = member
            yield member


def scan_shard(path: Path, label: LabelRule | None = None, num_classes: int | None = None) -> ShardScan:
    """Reads a shard for its digest, and again, now from memory as a rule, for its headers and the images' checksums.

    Samples are files that share their name up to the first dot of the last component and follow each other. Raises
    ShardError that names the shard and the sample: no image or several, no label, a label that is no integer or not
    below `num_classes`, a key that comes twice, a name that leads out of the archive, a shard that is cut off.
    """
    label = label or LabelRule()
    limit = num_classes if num_classes is not None else MAX_CLASSES
    rows: list[tuple[int, int, int, int]] = []
    seen: set[str] = set()
    with explained(f"cannot read {path}"), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        for key, files in _samples(_regular(_walk(file, path, 0, size)), path):
            if key in seen:
                raise ShardError(f"{path}: sample {key} comes twice")
            seen.add(key)
            image = _only_image(files, path, key)
            number = _label(file, files, label, path, key)
            if not 0 <= number < limit:
                raise ShardError(f"{path}: sample {key} has label {number}, expected 0 to {limit - 1}")
            data = os.pread(file.fileno(), image.size, image.offset)
            rows.append((image.offset, image.size, number, checksum(data)))
    return ShardScan(Shard(path.name, len(rows), size, digest), np.array(rows, dtype=ROW))


def _walk(file: BinaryIO, path: Path, start: int, end: int) -> Iterator[tarfile.TarInfo]:
    file.seek(start)
    head = file.read(tarfile.BLOCKSIZE)
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise ShardError(f"{path} is compressed ({name}); samples are found by offset, so unpack it to a plain tar")
    file.seek(start)
    try:
        archive = tarfile.TarFile(fileobj=file, mode="r", encoding="utf-8", errors="surrogateescape")
        while (info := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # it would keep every member
            if archive.offset > end:
                raise ShardError(f"{path}: cut off or damaged: {info.name} ends after the archive does")
            if info.size < 0:  # it would lead back to its own header, for ever
                raise ShardError(f"{path}: damaged: {info.name} has a size of {info.size} bytes")
            if info.name.startswith("/") or ".." in info.name.split("/"):
                raise ShardError(f"{path}: the name {info.name!r} leads out of the archive")
            if info.issparse():
                raise ShardError(f"{path}: {info.name} is a sparse file, which cannot be read by offset")
            yield info
    except ShardError:
        raise
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:  # all but the first by absurd sizes
        raise ShardError(f"{path}: not a tar, or a damaged one ({error})") from error
    # tarfile takes anything that is no header for the end; only a block of zeros is one.
    file.seek(archive.offset)
    block = file.read(tarfile.BLOCKSIZE) if archive.offset < end else b""
    if block != bytes(tarfile.BLOCKSIZE):
        what = "damaged" if len(block) == tarfile.BLOCKSIZE else "cut off"
        raise ShardError(f"{path}: {what}: no tar header and no end of archive at byte {archive.offset}")


def _regular(infos: Iterator[tarfile.TarInfo]) -> Iterator[Member]:
    """Yields the members that webdataset reads, which passes over links."""
    return (Member(info.name, info.offset_data, info.size) for info in infos if info.isreg())


def _kind(info: tarfile.TarInfo) -> str:
    if info.issym():
        return f"a symbolic link to {info.linkname}"
    return (
        f"a hard link to {info.linkname}, which is no file before it" if info.islnk() else "neither a file nor a link"
    )


def _samples(members: Iterator[Member], path: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    current: str | None = None
    files: dict[str, Member] = {}
    for member in members:
        match = _KEY_AND_SUFFIX.fullmatch(member.name)
        if match is None or re.match(r"__[^/]*__($|/)", member.name):  # webdataset passes over both
            continue
        key, suffix = match[1], match[2].lower()
        if key != current:
            if current is not None:
                yield current, files
            current, files = key, {}
        if suffix in files:
            raise ShardError(f"{path}: sample {key} has two files .{suffix}")
        files[suffix] = member
    if current is not None:
        yield current, files


def _only_image(files: dict[str, Member], path: Path, key: str) -> Member:
    images = [suffix for suffix in files if f".{suffix}" in IMAGE_SUFFIXES]
    if len(images) != 1:
        has = ", ".join(f".{suffix}" for suffix in sorted(images or files))
        what = "several images" if images else "no image"
        raise ShardError(f"{path}: sample {key} has {what}; its files: {has}")
    image = files[images[0]]
    if image.size > MAX_IMAGE_BYTES:
        raise ShardError(f"{path}: the image of sample {key} has {image.size} bytes, more than {MAX_IMAGE_BYTES}")
    return image


def _label(file: BinaryIO, files: dict[str, Member], rule: LabelRule, path: Path, key: str) -> int:
    member = files.get(rule.suffix)
    if member is None:
        has = ", ".join(f".{suffix}" for suffix in sorted(files))
        raise ShardError(f"{path}: sample {key} has no .{rule.suffix} file for its label; its files: {has}")
    if member.size > _MAX_LABEL_BYTES:
        raise ShardError(f"{path}: the .{rule.suffix} file of sample {key} has {member.size} bytes")
    try:
        return rule.read(os.pread(file.fileno(), member.size, member.offset))
    except ValueError as error:
        raise ShardError(f"{path}: sample {key}: {error}") from error
