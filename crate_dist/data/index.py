"""The index beside the shards: samples per shard, offsets, digests, class names.

A split is a folder of plain WebDataset tars with two files beside them:

    index.json   shards (name, samples, bytes, sha256), classes, and how the split was made
    index.npy    one row per sample, in the order of the shards: offset and size of the image, label, checksum

The rows are memory-mapped, so that a rank pays for the samples that it reads and all ranks of a node share them.
Version 1 had no checksums; such an index is read as it is, and written again as it is.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from xxhash import xxh3_64_intdigest

from crate_dist.errors import UserError
from crate_dist.files import written_whole
from crate_dist.locations import redacted

INDEX_JSON = "index.json"
INDEX_ROWS = "index.npy"
TAR_BLOCK = 512
"""Bytes of the header before every file in a tar."""
_SHARDS_AT_ONCE = 1024
ROW_WITHOUT_CHECKSUM = np.dtype([("offset", "<i8"), ("size", "<i4"), ("label", "<i4")])
ROW = np.dtype([*ROW_WITHOUT_CHECKSUM.descr, ("checksum", "<u8")])
"""offset: of the image's first byte in its tar; size: bytes; label: class number from 0; checksum: of the image."""
FORMATS = {1: ROW_WITHOUT_CHECKSUM, 2: ROW}
"""By the version in index.json. A program that knows version 1 alone refuses the other, and reads no wrong rows."""
_MOST = 2**63 - 1


class ShardError(UserError, ValueError):
    """Shards or an index that cannot be used; the message names the file and what would do."""


def checksum(image: bytes) -> int:
    """Returns the XXH3, 64 bits, of the bytes of an image: against chance damage, at some 20 GB a second."""
    return xxh3_64_intdigest(image)


@dataclass(frozen=True)
class Shard:
    """One tar file of a split."""

    name: str
    samples: int
    bytes: int
    sha256: str

    @classmethod
    def read(cls, entry: Any, what: str = "shard") -> Shard:
        """Reads a shard from JSON. Raises ValueError that names the field, `what` in front, for one that cannot be."""
        if not isinstance(entry, dict) or entry.keys() != cls.__dataclass_fields__.keys():
            raise ValueError(f"{what} is {_shown(entry)}, expected {', '.join(cls.__dataclass_fields__)}")
        shard = cls(**entry)
        for field_name, number in (("samples", shard.samples), ("bytes", shard.bytes)):
            if type(number) is not int or not 0 <= number <= _MOST:
                raise ValueError(f"{what}.{field_name} is {_shown(number)}, expected a whole number from 0 to 2^63 - 1")
        if not isinstance(shard.name, str) or shard.name in ("", ".", "..") or re.search(r"[/\0]", shard.name):
            raise ValueError(f"{what}.name is {_shown(shard.name)}, which is no name of a shard in the same folder")
        if not isinstance(shard.sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", shard.sha256):
            raise ValueError(f"{what}.sha256 is {_shown(shard.sha256)}, expected 64 hexadecimal digits")
        return shard


@dataclass(frozen=True)
class Remote:
    """A place that shards are fetched from, and the cache of them that each node keeps.

    url: of the split; file names are put in place of `{}` in it, or behind it
    """

    url: str
    cache: Path
    cache_bytes: int


@dataclass(frozen=True)
class ShardIndex:
    """A split of shards: where every sample lies and what it is.

    rows: structured array of shape (num_samples,) and dtype ROW, sample ids being its row numbers
    classes: class ids (ImageNet: wnids), position = label; class_names: for people, same length
    made_by: what the converter was told, for the record
    remote: where the shards lie that are not in `root`, which then holds the index alone
    rows_sha256: of the file of rows, as index.json has it; older ones do not say it
    """

    root: Path
    shards: Sequence[Shard]
    rows: np.ndarray
    classes: Sequence[str]
    class_names: Sequence[str]
    made_by: Mapping[str, Any] = field(default_factory=dict)
    remote: Remote | None = None
    rows_sha256: str | None = None

    @property
    def place(self) -> Path | str:
        """The folder or the URL of the shards, for people: what is nobody else's business is left out of it."""
        return redacted(self.remote.url) if self.remote else self.root

    @property
    def has_checksums(self) -> bool:
        """True when rows have a checksum of their image."""
        return "checksum" in (self.rows.dtype.names or ())

    @property
    def num_samples(self) -> int:
        """Samples in the whole split."""
        return len(self.rows)

    @property
    def num_classes(self) -> int:
        """Classes that labels may name."""
        return len(self.classes)

    @property
    def shard_sizes(self) -> np.ndarray:
        """Samples per shard, int64 of shape (shards,)."""
        return np.array([shard.samples for shard in self.shards], dtype=np.int64)

    @classmethod
    def load(cls, root: Path, remote: Remote | None = None) -> ShardIndex:
        """Opens the index of the split in `root`, rows memory-mapped.

        Raises ShardError when the folder or its index is missing, of another version, or contradicts itself.
        """
        root = Path(root)
        path = root / INDEX_JSON
        if not root.is_dir():
            raise ShardError(f"no folder {root}{_instead(root)}")
        if not path.is_file():
            tars = any(root.glob("*.tar"))
            remedy = (
                f"`python data_prep/index.py {root}` builds it"
                if tars
                else "there are no shards here: data_prep/imagenet.py or image_folder.py writes them"
            )
            raise ShardError(f"no {INDEX_JSON} in {root}; {remedy}")
        rebuild = _rebuilds(root, remote)
        try:
            meta = read_meta(path)
            shards, row = [Shard(**entry) for entry in meta["shards"]], FORMATS[meta["version"]]
            rows = open_memmap(root / INDEX_ROWS, mode="r")  # np.load takes archives too, which are no array
        except ShardError:
            raise
        except Exception as error:  # numpy's parser of headers raises whatever the bytes make it trip over
            reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
            raise ShardError(f"{path} is damaged ({reason}); {rebuild} it") from error
        expected = sum(shard.samples for shard in shards)
        if rows.dtype != row or rows.shape != (expected,):
            kinds = ("", "") if rows.dtype == row else (f" of {rows.dtype}", f" of {row}")
            raise ShardError(
                f"{root / INDEX_ROWS} has {len(rows) if rows.ndim else 0} rows{kinds[0]}, {INDEX_JSON} promises "
                f"{expected}{kinds[1]}; {rebuild} both"
            )
        names = meta["classes"], meta["class_names"]
        return cls(root, shards, rows, *names, meta["made_by"], remote, meta.get("rows_sha256"))

    def check_rows(self) -> None:
        """Looks at every row. Raises ShardError for one that points out of its shard or has a label of no class, and
        when the rows are not those that index.json was written with.

        Takes 20 ms for a million samples; the reader looks again at each row that it uses.
        """
        sizes, ends = self.shard_sizes, np.cumsum(self.shard_sizes)
        limits = np.array([shard.bytes for shard in self.shards], dtype=np.int64)
        for first in range(0, len(sizes), _SHARDS_AT_ONCE):
            some = slice(first, first + _SHARDS_AT_ONCE)
            start = int(ends[first] - sizes[first])
            rows = self.rows[start : start + int(sizes[some].sum())]
            last = np.repeat(limits[some], sizes[some]) - rows["size"]  # the sum of both may be past 2^63
            good = (rows["offset"] >= TAR_BLOCK) & (rows["size"] >= 0) & (rows["offset"] <= last)
            good &= (rows["label"] >= 0) & (rows["label"] < self.num_classes)
            if not good.all():
                raise self.bad_row(start + int(np.argmin(good)))
        if self.rows_sha256 is None:
            return
        with (self.root / INDEX_ROWS).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.rows_sha256:
            raise ShardError(
                f"{self.root / INDEX_ROWS} does not belong to the {INDEX_JSON} beside it, or changed since; "
                f"{_rebuilds(self.root, self.remote)} both"
            )

    def bad_row(self, sample: int) -> ShardError:
        """Returns what is to be raised for a row that cannot be right."""
        row = self.rows[sample]
        return ShardError(
            f"row {sample} of {self.root / INDEX_ROWS} cannot be right: {row['size']} bytes at byte {row['offset']}, "
            f"label {row['label']} of {self.num_classes} classes; {_rebuilds(self.root, self.remote)} it"
        )

    def save(self) -> None:
        """Writes both files beside the shards, each whole or not at all; index.json, the one looked for, last."""
        buffer = io.BytesIO()
        version = 2 if self.has_checksums else 1
        np.save(buffer, np.ascontiguousarray(self.rows, dtype=FORMATS[version]), allow_pickle=False)
        meta = {
            "version": version,
            "samples": self.num_samples,
            "rows_sha256": hashlib.sha256(buffer.getbuffer()).hexdigest(),
            "shards": [asdict(shard) for shard in self.shards],
            "classes": list(self.classes),
            "class_names": list(self.class_names),
            "made_by": dict(self.made_by),
        }
        with written_whole(self.root / INDEX_JSON) as text:  # which has its name only when the rows have theirs
            text.write(json.dumps(meta, indent=1).encode())
            with written_whole(self.root / INDEX_ROWS) as rows:
                rows.write(buffer.getbuffer())


def read_meta(path: Path) -> dict[str, Any]:
    """Reads an index.json and checks it field by field.

    Raises ShardError for another version, ValueError that names the field for what no index says; OSError, and
    RecursionError for JSON that is nested without end.
    """
    meta = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(meta, dict):
        raise ValueError(f"it is {_shown(meta)}")
    if missing := [key for key in ("version", "shards", "classes", "class_names", "made_by") if key not in meta]:
        raise ValueError(f"it has no {', '.join(missing)}")
    if type(meta["version"]) is not int or meta["version"] not in FORMATS:
        known = " and ".join(map(str, FORMATS))
        raise ShardError(
            f"{path} has version {_shown(meta['version'])}, this program reads {known}: take the crate-dist that wrote "
            f"it, or a later one, or move it away and build it anew with `python data_prep/index.py {path.parent}`"
        )
    for key in ("shards", "classes", "class_names"):
        if not isinstance(meta[key], list):
            raise ValueError(f"{key} is {_shown(meta[key])}, expected a list")
    shards = [Shard.read(entry, f"shards[{number}]") for number, entry in enumerate(meta["shards"])]
    if len({shard.name for shard in shards}) < len(shards):
        raise ValueError("two of its shards have the same name")
    samples = sum(shard.samples for shard in shards)
    if type(meta.get("samples", samples)) is not int or meta.get("samples", samples) != samples:
        raise ValueError(f"samples is {_shown(meta['samples'])}, and its shards have {samples}")
    for key in ("classes", "class_names"):
        if wrong := [name for name in meta[key] if not isinstance(name, str)]:
            raise ValueError(f"{key} has {_shown(wrong[0])}, expected text")
    if len(meta["classes"]) != len(meta["class_names"]):
        raise ValueError(f"it has {len(meta['classes'])} classes and {len(meta['class_names'])} class_names")
    if not isinstance(meta["made_by"], dict) or not isinstance(meta["made_by"].get("label", ""), str):
        raise ValueError(f"made_by is {_shown(meta['made_by'])}, expected a table whose label is text")
    return meta


def _instead(root: Path) -> str:
    """Says what there is in place of the folder of a split, and who writes one."""
    if (root.parent / INDEX_JSON).is_file():
        return f": {root.parent} is a split itself, and the folder above it is the one to give, {root.parent.parent}"
    if root.parent.is_file():
        return f": {root.parent} is a file; give the folder that a conversion wrote"
    if not root.parent.exists():
        return f": data_prep/imagenet.py or data_prep/image_folder.py writes one, and there is no {root.parent} either"
    there = ", ".join(sorted(path.parent.name for path in root.parent.glob(f"*/{INDEX_JSON}")))
    writers = "data_prep/imagenet.py or data_prep/image_folder.py writes one"
    return f"; there {'is' if there.count(',') == 0 else 'are'} {there}" if there else f": {writers}"


def _rebuilds(root: Path, remote: Remote | None) -> str:
    """Says the remedy, to be followed by its object; data_prep/index.py takes no URL."""
    if remote is None:
        return f"`python data_prep/index.py {root}` rebuilds"
    return f"`python data_prep/index.py DIR`, where the shards of {redacted(remote.url)} lie, rebuilds"


def _shown(value: Any) -> str:
    """Says a value of a file in a message, in one line and not at any length."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
