"""Reads single samples out of tar shards by their offsets."""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from crate_dist.data.index import ShardError, ShardIndex

_OPEN_SHARDS = 64
_TAR_BLOCK = 512


class BadSample(NamedTuple):
    """A sample that did not decode: where it stands, and why it was replaced."""

    shard: str
    key: str
    reason: str


class ShardReader:
    """Reads the bytes of a sample by its offset, keeping the last shards open."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self._ends = np.cumsum(index.shard_sizes)
        self._files: OrderedDict[int, int] = OrderedDict()

    def read(self, sample: int) -> bytes:
        """The image of a sample. Raises ShardError when its shard is gone or shorter than the index says."""
        row = self.index.rows[sample]
        return self._pread(sample, int(row["size"]), int(row["offset"]))

    def describe(self, sample: int, reason: str) -> BadSample:
        """Names a sample by its shard and by the key in the tar header before it."""
        header = self._pread(sample, _TAR_BLOCK, int(self.index.rows[sample]["offset"]) - _TAR_BLOCK)
        name = header[:100].partition(b"\0")[0].decode("utf-8", "replace")
        return BadSample(self.index.shards[self._shard(sample)].name, name, reason)

    def _shard(self, sample: int) -> int:
        return int(np.searchsorted(self._ends, sample, side="right"))

    def _pread(self, sample: int, size: int, offset: int) -> bytes:
        shard = self._shard(sample)
        path = self.index.root / self.index.shards[shard].name
        try:
            data = os.pread(self._open(shard), size, offset)
        except OSError as error:
            raise ShardError(f"cannot read {path}: {error.strerror}") from error
        if len(data) != size:
            raise ShardError(
                f"{path} ends before sample {sample} does; `python data_prep/verify.py {self.index.root}` "
                "says which shards differ from their index"
            )
        return data

    def _open(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        descriptor = os.open(self.index.root / self.index.shards[shard].name, os.O_RDONLY | os.O_CLOEXEC)
        self._files[shard] = descriptor
        if len(self._files) > _OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        return descriptor
