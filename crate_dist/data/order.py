"""The order of training samples: a pure function of (seed, epoch, position), and of nothing else.

How many nodes, ranks, loader workers or micro-batches there are does not enter, so the state of the data pipeline
is one integer, the global position, and resuming anywhere costs no replay.

    stream     the shards of an epoch, shuffled and laid end to end
    lanes      the stream cut into a fixed number of equal parts that are read side by side;
               position p of an epoch is sample p // lanes of lane p % lanes
    windows    each lane cut into equal runs of at most `window` samples, shuffled within

A rank takes neighbouring lanes, so a node reads few shards at a time and reads them whole. Odd lanes run backwards:
the two lanes that share a shard reach it at the same time. Memory is bounded by shards, not by samples.

Epochs follow each other without a gap: a global batch may begin in one epoch and end in the next, so that every
epoch visits every sample exactly once and nothing is dropped. With repeated augmentation it visits every sample the
same number of times, see repeats.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from crate_dist.config import Recipe
from crate_dist.data.repeats import Repeats

Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]


def hash64(*parts: int | np.ndarray) -> UInt64:
    """Hashes integers to 64 well mixed bits, broadcasting arrays; at least one-dimensional.

    Chained finalizers of SplitMix64 (Steele, Lea, Flood 2014). Our own and in integers only, so that an order does
    not change with the version of a library or with the machine.
    """
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = _mix(state ^ _mix(np.atleast_1d(np.asarray(part)).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)))
    return state


def permutation(size: int, *key: int) -> Int64:
    """Returns a shuffled arange(size), a pure function of `key`."""
    return np.argsort(hash64(*key, np.arange(size, dtype=np.int64)), kind="stable")


class Views(NamedTuple):
    """What stands at some positions, each (n,): the sample, the epoch, and which of the sample's views in the epoch."""

    samples: Int64
    epochs: Int64
    repeats: Int64


class Order:
    """The map from global positions to sample ids.

    Parameters
    ----------
    shard_sizes: samples per shard; sample ids count through the shards as they stand in the index
    seed: of the run
    lanes: parts of the stream that are read side by side
    window: samples that are shuffled together within a lane, the bound on what a lane keeps in page cache
    repeats: the views of each sample in an epoch

    num_samples: without repeats; epoch_size: positions of an epoch, with them
    """

    def __init__(
        self,
        shard_sizes: Sequence[int] | Int64,
        seed: int,
        lanes: int = 64,
        window: int = 4096,
        repeats: Repeats = Repeats(),  # noqa: B008  frozen
    ) -> None:
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        if not self.num_samples or lanes < 1 or window < 1:
            raise ValueError(f"an order needs samples, lanes and a window; not {self.num_samples}, {lanes}, {window}")
        self.seed, self.lanes, self.window, self.repeats = seed, lanes, window, repeats
        self.epoch_size = repeats.count * self.num_samples
        self._shard_starts = np.cumsum(self.shard_sizes) - self.shard_sizes
        sizes = self.num_samples // lanes + (np.arange(lanes) < self.num_samples % lanes)
        self._lane_sizes = sizes.astype(np.int64)
        self._lane_starts = np.cumsum(self._lane_sizes) - self._lane_sizes
        self._lane_windows = -(-self._lane_sizes // window)

    def samples(self, positions: Int64) -> Int64:
        """Returns the sample ids at global positions (epoch * epoch_size + position in the epoch), both (n,)."""
        return self.views(positions).samples

    def views(self, positions: Int64) -> Views:
        """Returns what stands at global positions (n,)."""
        epochs, positions = np.divmod(np.asarray(positions, dtype=np.int64), self.epoch_size)
        positions, repeats = self.repeats.views(positions, self.num_samples, self.lanes)
        ids = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = self._epoch_samples(int(epoch), positions[here])
        return Views(ids, epochs, repeats)

    def batch_positions(self, step: int, global_batch: int) -> Int64:
        """Returns the global positions of a step's batch, (global_batch,), neighbours in a lane standing together.

        Cut into equal contiguous parts it gives each rank its lanes; the whole does not depend on the cut. Repeats
        stand in the order of the lanes already, and sorting them would bring a sample's views together.
        """
        positions = np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)
        if self.repeats.count > 1:
            return positions
        return positions[np.argsort(positions % self.num_samples % self.lanes, kind="stable")]

    def _epoch_samples(self, epoch: int, position: Int64) -> Int64:
        lane, index = position % self.lanes, position // self.lanes
        size, windows = self._lane_sizes[lane], self._lane_windows[lane]
        # The windows of a lane are as equal as whole numbers allow: window w is [w*size//windows, (w+1)*size//windows).
        window = ((index + 1) * windows - 1) // size
        start, stop = window * size // windows, (window + 1) * size // windows
        offset = np.empty_like(position)
        code = lane * int(self._lane_windows.max()) + window
        for value in np.unique(code):
            here = code == value
            first = int(np.argmax(here))
            shuffled = _window_permutation(
                int(stop[first] - start[first]), self.seed, epoch, int(lane[first]), int(window[first])
            )
            offset[here] = start[first] + shuffled[index[here] - start[first]]
        offset = np.where(lane % 2 == 0, offset, size - 1 - offset)
        return self._stream_samples(epoch, self._lane_starts[lane] + offset)

    def _stream_samples(self, epoch: int, place: Int64) -> Int64:
        shards, ends = self._stream(epoch)
        slot = np.searchsorted(ends, place, side="right")
        shard = shards[slot]
        return self._shard_starts[shard] + place - (ends[slot] - self.shard_sizes[shard])

    @lru_cache(maxsize=2)  # noqa: B019  one order lives as long as its process
    def _stream(self, epoch: int) -> tuple[Int64, Int64]:
        """Returns the epoch's shards in their order, and the place in the stream at which each ends."""
        shards = permutation(len(self.shard_sizes), self.seed, epoch)
        return shards, np.cumsum(self.shard_sizes[shards])


def training_order(shard_sizes: Sequence[int] | Int64, recipe: Recipe) -> Order:
    """Returns the order in which a run of the recipe visits these shards."""
    repeats = Repeats(recipe.order.repeats, recipe.train.group, recipe.train.global_batch)
    return Order(shard_sizes, recipe.train.seed, recipe.lanes, recipe.order.window, repeats)


@lru_cache(maxsize=512)
def _window_permutation(size: int, seed: int, epoch: int, lane: int, window: int) -> NDArray[np.int32]:
    return permutation(size, seed, epoch, lane, window).astype(np.int32)


def _mix(value: UInt64) -> UInt64:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: UInt64 = value ^ (value >> np.uint64(31))
    return mixed
