"""Repeated augmentation: every sample several times in an epoch, close together and never side by side.

Hoffer et al. 2019 (arXiv 1901.09335) and Berman et al. 2019 (arXiv 1902.05509) put several views of a sample, each with
an augmentation of its own, into one batch. Here an epoch has `count` views of every sample, laid out in two steps:

    chunks  the base order cut into runs of whole rows (a row: one position of every lane) that are as equal as whole
            numbers allow, each about global_batch / count positions long, and its positions sorted by lane
    tiles   each chunk cut into equal runs of at least `group` positions; a tile's views follow each other `count` times

The invariant: any `group` neighbouring positions of an epoch, wherever they begin, are of different samples. A tile is
no shorter than a group, so a group touches two runs of views at most; those are of different tiles, or one's end and
the other's beginning in the same tile, and then no position is in both. It holds for every group that a micro-batch
holds whole, whatever the epoch's length and wherever in a step it begins. Where an epoch ends and the next one begins
a group has views of both: these may be of one sample by chance, as without repeats.

The `count` views of a sample are in one global batch, or in two that follow each other at its edges, wherever the batch
has room for 2 * count groups; in a smaller one they may lie further apart, as a tile has up to 2 * group - 1
positions. As without repeats, neighbours in a batch are neighbours in the order of the lanes, so a rank reads few.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Repeats:
    """The views of an epoch.

    count: of every sample; group: neighbouring positions that are to be of different samples; global_batch: views
    """

    count: int = 1
    group: int = 1
    global_batch: int = 1

    def views(self, position: Int64, num_samples: int, lanes: int) -> tuple[Int64, Int64]:
        """Maps positions among the count * num_samples views of an epoch to (base position, repeat from 0), all (n,).

        Raises ValueError: fewer samples than a group has.
        """
        if self.count == 1:
            return position, np.zeros_like(position)
        if num_samples < self.group:
            raise ValueError(f"{num_samples} samples cannot fill a group of {self.group} without a repeat")
        rows = max(num_samples // lanes, 1)  # the last one takes what is left
        wanted = round(num_samples * self.count / self.global_batch)
        chunks = max(min(wanted, rows // -(-self.group // lanes)), 1)
        row = np.minimum(position // self.count // lanes, rows - 1)
        first_row, end_row = _part(row, rows, chunks)
        first = first_row * lanes
        size = np.where(end_row == rows, num_samples, end_row * lanes) - first
        inside = position - self.count * first
        start, stop = _part(inside // self.count, size, np.maximum(size // self.group, 1))
        repeat, place = np.divmod(inside - self.count * start, stop - start)
        return first + _by_lane(start + place, size, lanes), repeat


def _part(index: Int64, size: Int64 | int, parts: Int64 | int) -> tuple[Int64, Int64]:
    """Returns where the part that an index lies in begins and ends; they are [n*size//parts, (n+1)*size//parts)."""
    part = ((index + 1) * parts - 1) // size
    return part * size // parts, (part + 1) * size // parts


def _by_lane(place: Int64, size: Int64, lanes: int) -> Int64:
    """Returns the position at a place of a chunk that is sorted by lane: columns of an array of `lanes` columns."""
    rows, rest = np.divmod(size, lanes)  # the first `rest` columns have one row more
    tall = rest * (rows + 1)
    column, row = np.divmod(place, rows + 1)
    low_column, low_row = np.divmod(place - tall, np.maximum(rows, 1))
    is_tall = place < tall
    position: Int64 = np.where(is_tall, row, low_row) * lanes + np.where(is_tall, column, rest + low_column)
    return position
