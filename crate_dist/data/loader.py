"""Makes batches from the order, the shards and the transforms.

Each loader worker makes whole micro-batches: positions -> sample ids -> reads by offset -> decode and augment ->
uint8. The images travel to the device as bytes, see feed.py, and become normalised numbers there. Workers write images
into memory that they share with the rank and that is used again and again: batches are not copied on their way, and no
pages are made for them, which would cost a third of decoding small JPEGs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from crate_dist.config import AugmentSection, Colour, ImageSection
from crate_dist.data.augment import augmentations
from crate_dist.data.decode import BadImage, Pixels
from crate_dist.data.folder import FolderReader, Indexed, open_reader
from crate_dist.data.index import ShardError, ShardIndex
from crate_dist.data.order import Int64, Order
from crate_dist.data.reader import BadSample, ShardReader
from crate_dist.data.shared import SharedArray
from crate_dist.data.transforms import EvalTransform, TrainTransform, sample_rng
from crate_dist.data.workers import Workers

_SUBSTITUTES = 16
_PREFETCH = 2
HELD_BATCHES = 3
"""Training batches that may be held at a time, the newest included; the memory of an older one is written again."""


class Batch(NamedTuple):
    """Images, uint8 (n, height, width, 3), and their labels, int64 (n,).

    bad: the samples that did not decode; replaced: the rows, from 0, in which another sample stands in for one
    samples: int64 (n,), their numbers in the split, those that the order asks for
    """

    images: torch.Tensor
    labels: torch.Tensor
    bad: Sequence[BadSample] = ()
    replaced: Sequence[int] = ()
    samples: Int64 | None = None


@dataclass(frozen=True)
class Share:
    """The part of every global batch that a rank makes, and its pieces."""

    rank: int
    world_size: int
    global_batch: int
    micro_batch: int

    @property
    def accumulation(self) -> int:
        """Micro-batches per step on each rank."""
        return self.global_batch // (self.world_size * self.micro_batch)

    def positions(self, order: Order, number: int) -> Int64:
        """Returns the global positions of this rank's micro-batch `number`, counted from the start of the run."""
        step, part = divmod(number, self.accumulation)
        first = (self.rank * self.accumulation + part) * self.micro_batch
        return order.batch_positions(step, self.global_batch)[first : first + self.micro_batch]


class _Filled(NamedTuple):
    """A batch as a worker sends it: its images lie in this slot of the shared memory."""

    slot: int
    labels: Int64
    bad: list[BadSample]
    replaced: list[int]
    samples: Int64


class TrainBatches:
    """Item n is this rank's micro-batch n, counted from the start of the run.

    slots: uint8 (slots, micro_batch, size, size, 3), the memory of that many batches; item n fills number n % slots.
    """

    def __init__(self, index: ShardIndex, order: Order, share: Share, transform: TrainTransform, slots: int) -> None:
        self.index, self.order, self.share, self.transform = index, order, share, transform
        self.slots = SharedArray((slots, share.micro_batch, transform.size, transform.size, 3))
        self._reader: ShardReader | None = None

    def samples(self, number: int) -> Int64:
        """Returns the sample ids of micro-batch `number`, those that the order asks for."""
        return self.order.samples(self.share.positions(self.order, number))

    def __getitem__(self, number: int) -> _Filled:
        self._reader = self._reader or ShardReader(self.index, self.samples)
        self._reader.at(number)
        positions = self.share.positions(self.order, number)
        samples, epochs, repeats = self.order.views(positions)

        def decode(data: bytes, place: int, out: Pixels) -> None:
            drawn_from = int(epochs[place]), int(samples[place]), int(repeats[place])
            self.transform(data, sample_rng(self.order.seed, *drawn_from), out)

        slot = number % len(self.slots.array)
        return _Filled(slot, *assemble(self._reader, samples, self.slots.array[slot], decode), samples)


class EvalBatches:
    """This rank's contiguous share of a split, in batches; every sample is in exactly one batch of one rank.

    slots: as in TrainBatches
    """

    def __init__(
        self, index: Indexed, rank: int, world_size: int, batch: int, transform: EvalTransform, slots: int
    ) -> None:
        self.index, self.batch, self.transform = index, batch, transform
        self.first, self.stop = (index.num_samples * r // world_size for r in (rank, rank + 1))
        self.slots = SharedArray((slots, batch, transform.size, transform.size, 3))
        self._reader: ShardReader | FolderReader | None = None

    def __len__(self) -> int:
        return -(-(self.stop - self.first) // self.batch)

    def samples(self, number: int) -> Int64 | None:
        """Returns the sample ids of batch `number`, None behind the last one."""
        first = self.first + number * self.batch
        return np.arange(first, min(first + self.batch, self.stop), dtype=np.int64) if first < self.stop else None

    def __getitem__(self, number: int) -> _Filled:
        self._reader = self._reader or open_reader(self.index, self.samples)
        self._reader.at(number)
        samples, slot = self.samples(number), number % len(self.slots.array)
        assert samples is not None
        images = self.slots.array[slot]

        def decode(data: bytes, _: int, out: Pixels) -> None:
            self.transform(data, out)

        return _Filled(slot, *assemble(self._reader, samples, images, decode), samples)


class TrainLoader(Iterator[Batch]):
    """This rank's micro-batches without end, from the first one of `step` on.

    Their images are views of `slots`, memory that is used again: no more than HELD_BATCHES are whole at any time.
    """

    def __init__(
        self, index: ShardIndex, order: Order, share: Share, transform: TrainTransform, workers: int, step: int = 0
    ) -> None:
        # When a batch is handed over, its worker has just been asked for the one _PREFETCH * workers further on.
        self.source = TrainBatches(index, order, share, transform, _PREFETCH * workers + HELD_BATCHES)
        self.slots = torch.from_numpy(self.source.slots.array)
        first = step * share.accumulation
        self._filled: Iterator[_Filled] = (
            Workers(self.source, workers, _PREFETCH, first)
            if workers
            else map(self.source.__getitem__, itertools.count(first))
        )

    def __next__(self) -> Batch:
        slot, labels, bad, replaced, samples = next(self._filled)
        return Batch(self.slots[slot], torch.from_numpy(labels), bad, replaced, samples)


class EvalLoader:
    """This rank's share of a split, once in every iteration; its workers end with that. Batches are the caller's."""

    def __init__(self, batches: EvalBatches, workers: int) -> None:
        self._batches, self._workers = batches, workers

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        count, slots = len(self), torch.from_numpy(self._batches.slots.array)
        filled: Iterator[_Filled] = (
            Workers(self._batches, self._workers, _PREFETCH, stop=count)
            if self._workers
            else map(self._batches.__getitem__, range(count))
        )
        pinned = torch.cuda.is_available()
        for slot, labels, bad, replaced, samples in filled:
            images = torch.empty((len(labels), *slots.shape[2:]), dtype=torch.uint8, pin_memory=pinned)
            images.copy_(slots[slot, : len(labels)])
            yield Batch(images, torch.from_numpy(labels), bad, replaced, samples)


def train_transform(augment: AugmentSection, images: ImageSection, size: int) -> TrainTransform:
    """Returns what makes a training image of `size` pixels as a recipe says."""
    further, drawn = augmentations(augment, images), (augment.crop_scale, augment.crop_ratio, augment.flip)
    return TrainTransform(size, *drawn, further, images.resize_filter, augment.crop)


def eval_transform(images: ImageSection, size: int) -> EvalTransform:
    """Returns what makes an image of `size` pixels to be evaluated as a recipe says."""
    short_side = round(size / images.eval_crop) if images.eval_fit == "crop" else None
    return EvalTransform(size, short_side, images.resize_filter)


def eval_loader(
    index: Indexed, rank: int, world_size: int, transform: EvalTransform, batch: int, workers: int
) -> EvalLoader:
    """Returns the loader of this rank's share of a split, or of a folder."""
    slots = _PREFETCH * workers + 1
    return EvalLoader(EvalBatches(index, rank, world_size, batch, transform, slots), workers)


class Normalize:
    """The map uint8 (n, height, width, 3) -> (x / 255 - mean) / std, (n, 3, height, width), on the device."""

    def __init__(self, mean: Colour, std: Colour, device: torch.device, dtype: torch.dtype) -> None:
        divisor = torch.tensor(std, device=device)
        self._scale = 1 / (255 * divisor)
        self._shift = torch.tensor(mean, device=device) / divisor
        self._device, self._dtype = device, dtype

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Returns a view in channels-last memory order: no pixel is moved."""
        pixels = images.to(self._device, non_blocking=True).float()
        return (pixels * self._scale - self._shift).to(self._dtype).permute(0, 3, 1, 2)


def assemble(
    reader: ShardReader | FolderReader, samples: Int64, images: Pixels, decode: Callable[[bytes, int, Pixels], object]
) -> tuple[Int64, list[BadSample], list[int]]:
    """Decodes into `images`. A sample that does not decode gives its place to the next one of the split that does.

    Returns (labels, samples that did not decode, rows that were given to another one). The rule depends on the sample
    alone, so all ranks and all restarts replace it by the same picture and label.
    """
    labels = np.empty(len(samples), dtype=np.int64)
    bad: list[BadSample] = []
    replaced: list[int] = []
    for place, sample in enumerate(samples.tolist()):
        for substitute in range(sample, sample + _SUBSTITUTES):
            substitute %= reader.index.num_samples
            try:
                decode(reader.read(substitute), place, images[place])
            except BadImage as error:
                bad.append(reader.describe(substitute, str(error)))
                continue
            labels[place] = reader.index.rows["label"][substitute]
            if substitute != sample:
                replaced.append(place)
            break
        else:
            raise ShardError(
                f"{_SUBSTITUTES} samples in a row do not decode in {reader.index.place}, "
                f"the last one {bad[-1].key} of {bad[-1].shard}: {bad[-1].reason}"
            )
    return labels, bad, replaced
