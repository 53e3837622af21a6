"""Reads single samples out of tar shards by their offsets, and holds each against its checksum in the index."""

from __future__ import annotations

import logging
import os
import tarfile
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from crate_dist.data.decode import MAX_BYTES, BadImage
from crate_dist.data.index import TAR_BLOCK, ShardError, ShardIndex, checksum
from crate_dist.data.remote.prefetch import CachedShards, Plan

_OPEN_SHARDS = 64

logger = logging.getLogger(__name__)


class BadSample(NamedTuple):
    """A sample that did not decode, or is not what was indexed: where it stands, and why it was replaced."""

    shard: str
    key: str
    reason: str


class ShardReader:
    """A reader of single samples of one split.

    plan: what will be read, so that remote shards are fetched ahead of need; without it they are fetched at need
    """

    def __init__(self, index: ShardIndex, plan: Plan | None = None) -> None:
        self.index = index
        self._ends = np.cumsum(index.shard_sizes)
        self._shards = CachedShards(index, plan) if index.remote else LocalShards(index)

    def at(self, number: int) -> None:
        """Learns that the next reads are for item `number` of the plan."""
        self._shards.at(number)

    def read(self, sample: int) -> bytes:
        """Reads the image of a sample, whose label is a class.

        Raises BadImage for more bytes than an image may have and for others than were indexed; ShardError when its row
        cannot be right, and when its shard is gone or not as long as the index says.
        """
        offset, size, label, *expected = self.index.rows[sample].item()
        if offset < TAR_BLOCK or size < 0 or not 0 <= label < self.index.num_classes:
            raise self.index.bad_row(sample)
        if size > MAX_BYTES and offset + size <= self.index.shards[self._shard(sample)].bytes:
            raise BadImage(f"{size:,} bytes, more than the {MAX_BYTES:,} that an image may have")
        data = self._pread(sample, size, offset)
        if expected and checksum(data) != expected[0]:
            return self._read_again(sample, size, offset, expected[0])
        return data

    def describe(self, sample: int, reason: str) -> BadSample:
        """Names a sample that does not decode by its shard and by the key in the tar header before it.

        Without a header of a file of that size there, what was read was no image to begin with: the index belongs to
        other shards, or the shard is damaged. The reason then names the remedy.
        """
        offset, size, *_ = self.index.rows[sample].item()
        shard = self.index.shards[self._shard(sample)].name
        if name := self.name(sample):
            return BadSample(shard, name, reason)
        reason += f"; no tar header of a file of {size} bytes stands before it, so index and shard differ"
        return BadSample(shard, f"sample {sample} at byte {offset}", f"{reason}; {self._verify()}")

    def name(self, sample: int) -> str:
        """Returns the name of an image in its shard, from the header before it; "" where no such header stands."""
        offset, size, *_ = self.index.rows[sample].item()
        try:
            header = tarfile.TarInfo.frombuf(self._pread(sample, TAR_BLOCK, offset - TAR_BLOCK), "utf-8", "replace")
        except (tarfile.HeaderError, ValueError):
            return ""
        return header.name if header.size == size else ""

    def _read_again(self, sample: int, size: int, offset: int, expected: int) -> bytes:
        """Reads bytes that came wrong, over a network or out of the page cache, from where they lie.

        A shard in the node's cache may be damaged there alone: then it is fetched again.
        """
        shard = self._shard(sample)
        os.posix_fadvise(self._shards.descriptor(shard), offset, size, os.POSIX_FADV_DONTNEED)
        if checksum(data := self._pread(sample, size, offset)) == expected:
            logger.warning("sample %d of %s was read wrong, and right when read again", sample, self._name(shard))
            return data
        if self._shards.renewed(shard) and checksum(data := self._pread(sample, size, offset)) == expected:
            return data
        raise BadImage(f"does not have the checksum in its index: its bytes have changed since; {self._verify()}")

    def _shard(self, sample: int) -> int:
        return int(np.searchsorted(self._ends, sample, side="right"))

    def _pread(self, sample: int, size: int, offset: int) -> bytes:
        shard = self._shard(sample)
        try:
            data = os.pread(self._shards.descriptor(shard), size, offset)
        except OSError as error:
            raise ShardError(f"cannot read {self._name(shard)}: {error.strerror}") from error
        if len(data) != size:
            raise ShardError(f"{self._name(shard)} ends before sample {sample} does; {self._verify()}")
        return data

    def _name(self, shard: int) -> str:
        return f"{self.index.place}/{self.index.shards[shard].name}"

    def _verify(self) -> str:
        return f"`python data_prep/verify.py {self.index.place}` says which shards differ from their index"


class LocalShards:
    """Shards in a folder, of which the last ones read stay open."""

    def __init__(self, index: ShardIndex) -> None:
        self._index = index
        self._open: OrderedDict[int, int] = OrderedDict()

    def at(self, number: int) -> None:
        """Does nothing: no shard needs to be fetched ahead."""

    def renewed(self, shard: int) -> bool:
        """Returns False: there is nowhere else to read a shard from."""
        return False

    def descriptor(self, shard: int) -> int:
        """Opens a shard by its number. Raises OSError, and ShardError when it is not as long as the index says."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        path, size = self._index.root / self._index.shards[shard].name, self._index.shards[shard].bytes
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        found = os.fstat(descriptor).st_size
        if found != size:
            os.close(descriptor)
            how = "ends before" if found < size else "goes on after"
            raise ShardError(
                f"{path} {how} its index does, with {found:,} and not {size:,} bytes; "
                f"`python data_prep/verify.py {self._index.root}` says which shards differ from their index"
            )
        self._open[shard] = descriptor
        if len(self._open) > _OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
