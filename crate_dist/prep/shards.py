"""Images with labels -> WebDataset tars.

One seeded shuffle of all samples, cut into shards of equal length (the last one may be shorter). Each shard is a
task of its own that depends on nothing else, so the bytes are the same at any number of workers and after any number
of interruptions. A shard is written under a hidden name, read back for its index rows, synced, and renamed.

Sample number p of the shuffled split has the key `<p, eight digits>-<stem of its file>`: unique, ASCII, and telling
where the image came from. An image that is left out (`skip_bad`) leaves a gap in the numbers and a shorter shard;
the other samples stay where they are.
"""

from __future__ import annotations

import argparse
import io
import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from crate_dist.data.decode import BadImage
from crate_dist.data.index import ROW, Shard, ShardError, checksum
from crate_dist.data.order import Int64, permutation
from crate_dist.files import written_whole
from crate_dist.prep.images import ImageOptions, extension, transcode
from crate_dist.prep.pool import advance
from crate_dist.prep.program import explained
from crate_dist.prep.samples import Samples
from crate_dist.prep.tar import scan_shard

_SHUFFLE = 0x73687566  # keeps the shuffle apart from what else is derived from the same seed
_PROGRESS_EVERY = 16
_TAR_BLOCK, _TAR_RECORD = 512, 10240


@dataclass(frozen=True)
class Part:
    """One machine's share of a conversion: of each split every `of`-th shard from the `number`-th on; else all."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Part:
        """Reads 3/16; a type for argparse."""
        match = re.fullmatch(r"([1-9][0-9]{0,3})/([1-9][0-9]{0,3})", text)
        if not match or int(match[1]) > int(match[2]):
            raise argparse.ArgumentTypeError(f"{text!r}: expected 1/16 to 16/16, for the first to the last of 16 parts")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def share(self, names: Sequence[str]) -> Sequence[str]:
        """Returns those of all shards that are this part's."""
        return names[self.number - 1 :: self.of]


WHOLE = Part()
"""The share of a machine that converts alone."""


@dataclass(frozen=True)
class JournalEntry:
    """A written shard, as one line of the conversion's journal has it.

    counted: oddities and re-encodings, name -> images; skipped: images that were left out, and why
    """

    shard: Shard
    counted: Mapping[str, int]
    skipped: Sequence[str]


@dataclass(frozen=True)
class ShardResult:
    """A finished shard; rows: its part of the index; kept: it stood already."""

    finished: JournalEntry
    rows: np.ndarray
    kept: bool


@dataclass(frozen=True)
class ShardTask:
    """One shard to be written, with its own samples only. first: number of its first sample in the shuffled split."""

    folder: Path
    name: str
    first: int
    samples: Samples
    image_options: ImageOptions
    skip_bad: bool
    finished: JournalEntry | None


@dataclass(frozen=True)
class ShardPlan:
    """The division of a split's samples into shards."""

    folder: Path
    samples: Samples
    seed: int
    shard_samples: int

    @property
    def num_shards(self) -> int:
        """The number of shards that will be written."""
        return -(-len(self.samples) // self.shard_samples)

    def names(self) -> list[str]:
        """Returns the file names of all shards, train-000000.tar and so on."""
        return shard_names(self.folder, self.num_shards)

    def samples_of(self, name: str) -> int:
        """Returns the number of samples of the shard with this name."""
        first = int(name.removesuffix(".tar").rpartition("-")[2]) * self.shard_samples
        return min(self.shard_samples, len(self.samples) - first)

    def order(self) -> Int64:
        """Returns the sample ids in the order in which they are written."""
        return permutation(len(self.samples), self.seed, _SHUFFLE)

    def estimated_bytes(self, ratio: float = 1.0) -> int:
        """Returns the bytes of all shards when an image shrinks to `ratio` of its size; exact for a ratio of 1."""
        images = (self.samples.sizes * ratio).astype(np.int64)
        blocks = -(-images // _TAR_BLOCK) + 3  # two headers and the label
        return int(blocks.sum()) * _TAR_BLOCK + self.num_shards * _TAR_RECORD

    def tasks(
        self,
        image_options: ImageOptions,
        skip_bad: bool,
        finished: Mapping[str, JournalEntry],
        wanted: Container[str] | None = None,
    ) -> Iterator[ShardTask]:
        """Yields the shards that are wanted, all unless given, in order, each made as it is taken."""
        order = self.order()
        for number, name in enumerate(self.names()):
            if wanted is not None and name not in wanted:
                continue
            first = number * self.shard_samples
            samples = self.samples.take(order[first : first + self.shard_samples])
            yield ShardTask(self.folder, name, first, samples, image_options, skip_bad, finished.get(name))


def make_shard(task: ShardTask) -> ShardResult:
    """Writes one shard, or keeps it when it stands and is what the journal says.

    Raises ShardError that names the file when an image cannot be read or used or the disk is full; nothing is left
    under the shard's name then, nor under its temporary one.
    """
    path = task.folder / task.name
    if task.finished and (rows := _rows_if_intact(path, task.finished)) is not None:
        advance(len(task.samples))
        return ShardResult(task.finished, rows, kept=True)
    counted: Counter[str] = Counter()
    skipped: list[str] = []
    with explained(f"cannot write {path}"), written_whole(path) as file:
        written = _write(file, task, counted, skipped)
        file.flush()
        scan = scan_shard(Path(file.name))
        if scan.rows["checksum"].tolist() != written:
            raise ShardError(f"{file.name} does not read back as it was written: memory or disk are at fault")
    if not written:
        path.unlink()
    shard = replace(scan.shard, name=task.name)
    return ShardResult(JournalEntry(shard, dict(counted), skipped), scan.rows, kept=False)


def shard_names(folder: Path, number: int) -> list[str]:
    """Returns the file names of a split's shards, called after its folder."""
    return [f"{folder.name}-{shard:06d}.tar" for shard in range(number)]


def unfinished_of(name: str) -> str | None:
    """Returns which file a killed conversion was to write when it left this one behind, None for any other file."""
    match = re.fullmatch(r"\.(.*)\.[0-9a-f]+\.tmp", name)
    return match[1] if match else None


def _rows_if_intact(path: Path, finished: JournalEntry) -> np.ndarray | None:
    if not finished.shard.samples:
        return np.empty(0, dtype=ROW)
    try:
        if path.stat().st_size != finished.shard.bytes:
            return None
        scan = scan_shard(path)
    except (OSError, ShardError):
        return None
    return scan.rows if scan.shard == finished.shard else None


def _write(file: BinaryIO, task: ShardTask, counted: Counter[str], skipped: list[str]) -> list[int]:
    """Writes a shard. Returns the checksums of its images, in their order."""
    from webdataset.writer import TarWriter  # here, because the program itself need not import it

    # The tar is made in memory, sample by sample, so that a full disk is met by our own write() below.
    buffer = io.BytesIO()
    samples, checksums = task.samples, []
    with TarWriter(buffer, encoder=False, mtime=0, user="crate", group="crate", mode=0o644) as writer:
        for i in range(len(samples)):
            if i % _PROGRESS_EVERY == 0:
                advance(min(_PROGRESS_EVERY, len(samples) - i))
            data = samples.read(i)
            try:
                image, oddities = transcode(data, task.image_options)
            except BadImage as error:
                if not task.skip_bad:
                    raise ShardError(
                        f"{samples.describe(i)}: {error}; --skip-bad leaves out and lists such images"
                    ) from None
                skipped.append(f"{samples.name(i)}: {error}")
                continue
            counted.update(oddities)
            key = f"{task.first + i:08d}-{_ascii_stem(samples.name(i))}"
            writer.write({"__key__": key, "cls": str(samples.labels[i]).encode(), extension(image): image})
            checksums.append(checksum(image))
            _drain(buffer, file)
    _drain(buffer, file)
    return checksums


def _drain(buffer: io.BytesIO, file: BinaryIO) -> None:
    file.write(buffer.getvalue())
    buffer.seek(0)
    buffer.truncate()


def _ascii_stem(name: str) -> str:
    """Returns the file's name without extension, in characters that a key may have, short enough for a plain header."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", PurePosixPath(name).stem)[:64]
