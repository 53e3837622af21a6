"""What lies beside the shards: samples per shard, offsets, digests, class names.

A split is a folder of plain WebDataset tars with two files beside them:

    index.json   shards (name, samples, bytes, sha256), classes, and how the split was made
    index.npy    one row per sample, in the order of the shards: offset and size of the image, label

The rows are memory-mapped, so that a rank pays for the samples that it reads and all ranks of a node share them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

INDEX_JSON = "index.json"
INDEX_ROWS = "index.npy"
FORMAT_VERSION = 1
TAR_BLOCK = 512
"""Every file in a tar has a header of so many bytes before it."""
_SHARDS_AT_ONCE = 1024
ROW = np.dtype([("offset", "<i8"), ("size", "<i4"), ("label", "<i4")])
"""offset: of the image's first byte in its tar; size: bytes; label: class number from 0."""


class ShardError(ValueError):
    """Shards or an index that cannot be used; the message names the file and what would do."""


@dataclass(frozen=True)
class Shard:
    """One tar file of a split."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Remote:
    """Where shards are fetched from, and where and how many bytes of them each node keeps.

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
        """The folder or the URL of the shards, for people."""
        return self.remote.url if self.remote else self.root

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
            raise ShardError(f"no folder {root}: data_prep/imagenet.py or data_prep/image_folder.py writes one")
        if not path.is_file():
            tars = any(root.glob("*.tar"))
            remedy = (
                f"`python data_prep/index.py {root}` builds it"
                if tars
                else "there are no shards here: data_prep/imagenet.py or image_folder.py writes them"
            )
            raise ShardError(f"no {INDEX_JSON} in {root}; {remedy}")
        rebuild = f"`python data_prep/index.py {remote.url if remote else root}` rebuilds it"
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            if meta["version"] != FORMAT_VERSION:
                raise ShardError(f"{path} has version {meta['version']}, this program reads {FORMAT_VERSION}")
            shards = [_shard(entry) for entry in meta["shards"]]
            rows = np.load(root / INDEX_ROWS, mmap_mode="r", allow_pickle=False)
            names = meta["classes"], meta["class_names"]
            index = cls(root, shards, rows, *names, meta["made_by"], remote, meta.get("rows_sha256"))
            well_formed = all(isinstance(names, list) for names in (index.classes, index.class_names))
            if not well_formed or not isinstance(index.made_by, dict):
                raise ValueError("its classes are no list")
        except ShardError:
            raise
        except Exception as error:  # numpy's parser of headers raises whatever the bytes make it trip over
            raise ShardError(f"{path} is damaged ({type(error).__name__}: {error}); {rebuild}") from error
        expected = sum(shard.samples for shard in shards)
        if rows.dtype != ROW or rows.shape != (expected,) or len(index.class_names) != len(index.classes):
            raise ShardError(
                f"{root / INDEX_ROWS} has {len(rows) if rows.ndim else 0} rows of {rows.dtype}, {INDEX_JSON} promises "
                f"{expected} of {ROW}; `python data_prep/index.py {index.place}` rebuilds both"
            )
        return index

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
            stops = rows["offset"] + rows["size"]
            good = (rows["offset"] >= TAR_BLOCK) & (rows["size"] >= 0) & (stops <= np.repeat(limits[some], sizes[some]))
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
                f"`python data_prep/index.py {self.place}` rebuilds both"
            )

    def bad_row(self, sample: int) -> ShardError:
        """What is to be raised for a row that cannot be right."""
        row = self.rows[sample]
        return ShardError(
            f"row {sample} of {self.root / INDEX_ROWS} cannot be right: {row['size']} bytes at byte {row['offset']}, "
            f"label {row['label']} of {self.num_classes} classes; `python data_prep/index.py {self.place}` rebuilds it"
        )

    def save(self) -> None:
        """Writes both files beside the shards, each whole or not at all; index.json, the one looked for, last."""
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(self.rows, dtype=ROW), allow_pickle=False)
        meta = {
            "version": FORMAT_VERSION,
            "samples": self.num_samples,
            "rows_sha256": hashlib.sha256(buffer.getbuffer()).hexdigest(),
            "shards": [asdict(shard) for shard in self.shards],
            "classes": list(self.classes),
            "class_names": list(self.class_names),
            "made_by": dict(self.made_by),
        }
        rows = self.root / f".{INDEX_ROWS}.{os.getpid()}.tmp"
        text = self.root / f".{INDEX_JSON}.{os.getpid()}.tmp"
        try:
            with rows.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            with text.open("w", encoding="utf-8") as out:
                json.dump(meta, out, indent=1)
                out.flush()
                os.fsync(out.fileno())
            rows.replace(self.root / INDEX_ROWS)
            text.replace(self.root / INDEX_JSON)
        finally:
            rows.unlink(missing_ok=True)
            text.unlink(missing_ok=True)


def _shard(entry: Mapping[str, Any]) -> Shard:
    """Raises ValueError or TypeError for what is no shard, or would lead out of the folder."""
    shard = Shard(**entry)
    if not all(type(value) is int and value >= 0 for value in (shard.samples, shard.bytes)):
        raise ValueError(f"shard {shard.name!r} has {shard.samples!r} samples in {shard.bytes!r} bytes")
    if not isinstance(shard.name, str) or shard.name in ("", ".", "..") or re.search(r"[/\0]", shard.name):
        raise ValueError(f"{shard.name!r} is no name of a shard in the same folder")
    if not isinstance(shard.sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", shard.sha256):
        raise ValueError(f"shard {shard.name!r} has {shard.sha256!r} in place of a sha256")
    return shard
