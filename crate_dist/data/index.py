"""What lies beside the shards: samples per shard, offsets, digests, class names.

A split is a folder of plain WebDataset tars with two files beside them:

    index.json   shards (name, samples, bytes, sha256), classes, and how the split was made
    index.npy    one row per sample, in the order of the shards: offset and size of the image, label

The rows are memory-mapped, so that a rank pays for the samples that it reads and all ranks of a node share them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

INDEX_JSON = "index.json"
INDEX_ROWS = "index.npy"
FORMAT_VERSION = 1
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
class ShardIndex:
    """A split of shards: where every sample lies and what it is.

    rows: structured array of shape (num_samples,) and dtype ROW, sample ids being its row numbers
    classes: class ids (ImageNet: wnids), position = label; class_names: for people, same length
    made_by: what the converter was told, for the record
    """

    root: Path
    shards: Sequence[Shard]
    rows: np.ndarray
    classes: Sequence[str]
    class_names: Sequence[str]
    made_by: Mapping[str, Any] = field(default_factory=dict)

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
    def load(cls, root: Path) -> ShardIndex:
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
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            if meta["version"] != FORMAT_VERSION:
                raise ShardError(f"{path} has version {meta['version']}, this program reads {FORMAT_VERSION}")
            shards = [Shard(**entry) for entry in meta["shards"]]
            rows = np.load(root / INDEX_ROWS, mmap_mode="r", allow_pickle=False)
            index = cls(root, shards, rows, meta["classes"], meta["class_names"], meta["made_by"])
        except ShardError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ShardError(f"{path} is damaged ({error}); `python data_prep/index.py {root}` rebuilds it") from error
        expected = int(index.shard_sizes.sum())
        if rows.dtype != ROW or len(rows) != expected or len(index.class_names) != len(index.classes):
            raise ShardError(
                f"{root / INDEX_ROWS} has {len(rows)} rows of {rows.dtype}, {INDEX_JSON} promises {expected} of {ROW}; "
                f"`python data_prep/index.py {root}` rebuilds both"
            )
        return index

    def save(self) -> None:
        """Writes both files beside the shards, each whole or not at all; index.json, the one looked for, last."""
        meta = {
            "version": FORMAT_VERSION,
            "samples": self.num_samples,
            "shards": [asdict(shard) for shard in self.shards],
            "classes": list(self.classes),
            "class_names": list(self.class_names),
            "made_by": dict(self.made_by),
        }
        rows = self.root / f".{INDEX_ROWS}.{os.getpid()}.tmp"
        text = self.root / f".{INDEX_JSON}.{os.getpid()}.tmp"
        try:
            with rows.open("wb") as file:
                np.save(file, np.ascontiguousarray(self.rows, dtype=ROW), allow_pickle=False)
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
