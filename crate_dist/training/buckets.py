"""The intervals of a flat gradient that are reduced together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass
class Bucket:
    """An interval of a group's flat gradient, of whole parameters, whose parts are reduced together.

    gradient: (elements,), of this rank in the model's precision; its mean over the ranks where it is reduced to
    views: of `gradient`, one for each of the parameters
    parts: owner -> what of `gradient` is of its partition
    mine: what of `gradient` is of this rank's partition, and of the fp32 sum that it goes into; None: nothing
    """

    gradient: Tensor
    parameters: list[nn.Parameter]
    views: list[Tensor]
    parts: dict[int, Tensor]
    mine: tuple[Tensor, Tensor] | None
    missing: int = 0
    streams: set[Any] = field(default_factory=set)
    was_read: Any = None


def cut(sizes: Sequence[int], smallest: int) -> Iterator[tuple[int, int]]:
    """Yields the buckets of tensors of these sizes, from the last one on, as [first, last) of each.

    smallest: elements that each bucket has at least, but the one with the first tensor
    """
    last, elements = len(sizes), 0
    for first in reversed(range(last)):
        elements += sizes[first]
        if elements >= smallest or first == 0:
            yield first, last
            last, elements = first, 0
