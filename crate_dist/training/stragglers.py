"""Names the rank that holds the others up.

Ranks that take each step together all show the same images/s. What differs is the time that each is by itself: from
the beginning of a micro-batch, the wait for its data included, until its first gradients are ready to be reduced.
After that, each waits for the others as well.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from crate_dist.wording import share

_LEAST_STEPS = 10
"""That are judged together: a moment in which a machine does something else is no straggler."""
_MUCH = 0.1
"""Share of the time that a straggler costs everybody."""
_SAID_AFTER = (5, 50, 500, 5000)
"""Judgements in a row."""
_MOST_PAIRS = 256
"""Of events that are kept between two reports."""


class OwnTime:
    """Times this rank's micro-batches up to their first reduction; by events of the device where it has streams.

    make_event: of an event with a clock; None: the host does everything itself
    """

    def __init__(self, make_event: Callable[[], Any] | None) -> None:
        self._make_event, self._begun, self._count = make_event, None, 0
        self._pairs: list[tuple[Any, Any]] = []

    def begin(self) -> None:
        """Begins a micro-batch."""
        self._count += 1
        self._begun = self._now() if len(self._pairs) < _MOST_PAIRS else None

    def ready(self) -> None:
        """Ends its first part; of several calls the first counts."""
        if self._begun is not None:
            self._pairs.append((self._begun, self._now()))
            self._begun = None

    def take(self) -> float:
        """Returns the seconds of all micro-batches since the last call, by the mean of those that are known.

        Waits for nothing: what the device has not come to is not known.
        """
        if self._make_event is None:
            seconds = [end - begin for begin, end in self._pairs]
        else:
            seconds = [begin.elapsed_time(end) / 1e3 for begin, end in self._pairs if end.query()]
        total = self._count * sum(seconds) / len(seconds) if seconds else 0.0
        self._pairs, self._count = [], 0
        return total

    def _now(self) -> Any:
        if self._make_event is None:
            return time.perf_counter()
        event = self._make_event()
        event.record()
        return event


@dataclass(frozen=True)
class Lag:
    """What the slowest rank costs.

    lost: share of the time of every rank
    text: for people; "": it is not yet sure, or was said
    """

    rank: int
    lost: float
    text: str


class Stragglers:
    """Judges the ranks, every few steps. nodes: the name of each rank's."""

    _own_s: list[float]
    _wait_s: list[float]

    def __init__(self, nodes: Sequence[str]) -> None:
        self._nodes = nodes
        self._in_a_row = Counter[int]()
        self._judged = -1  # of the first steps, in which libraries and loaders start, no rank is judged
        self._reset()

    def note(self, steps: int, own_s: Sequence[float], wait_s: Sequence[float], step_s: float) -> Lag | None:
        """Takes up some steps; returns a judgement once there are enough of them.

        own_s: see OwnTime; wait_s: of it and of the rest, the waiting for data; step_s: of these steps together
        """
        self._steps += steps
        self._step_s += step_s
        self._own_s = [a + b for a, b in zip(self._own_s, own_s, strict=True)]
        self._wait_s = [a + b for a, b in zip(self._wait_s, wait_s, strict=True)]
        if self._steps < _LEAST_STEPS:
            return None
        self._judged += 1
        lag = self._judge() if self._judged else None
        self._reset()
        return lag

    def _judge(self) -> Lag:
        own, wait = _median(self._own_s), _median(self._wait_s)
        usual = 3 * _median([abs(own_s - own) for own_s in self._own_s])  # between ranks at this moment
        lost, waits = list[float](), list[bool]()
        for own_s, wait_s in zip(self._own_s, self._wait_s, strict=True):
            late = own_s - own if own_s - own > usual else 0.0
            for_data = min(max(wait_s - wait, 0.0), late)
            # Who computes slowly does so to the end of the step; what is timed is a third of it or more.
            computing = late - for_data
            lost.append(for_data / self._step_s + min(3 * computing / self._step_s, computing / max(own_s, 1e-9)))
            waits.append(2 * for_data > late)
        for rank, of_all in enumerate(lost):
            self._in_a_row[rank] = self._in_a_row[rank] + 1 if of_all > _MUCH else 0
        worst = max(range(len(lost)), key=lost.__getitem__)
        sure = [rank for rank, times in self._in_a_row.items() if times >= _SAID_AFTER[0]]
        text = ""
        if any(self._in_a_row[rank] in _SAID_AFTER for rank in sure):
            named = max(sure, key=lost.__getitem__)
            slower, why = self._own_s[named] / max(own, 1e-9) - 1, "waits for data" if waits[named] else "computes"
            text = (
                f"rank {named} on node {self._nodes[named]} is {share(slower)} slower than the median for the last "
                f"{self._in_a_row[named]} reports ({why}); it costs all ranks about {share(lost[named])} of their time"
            )
            others = Counter(self._nodes[rank] for rank in sure if rank != named)
            text += "".join(f"; slow as well: {count} of node {node}" for node, count in others.most_common(3))
        return Lag(worst, lost[worst], text)

    def _reset(self) -> None:
        self._steps, self._step_s = 0, 0.0
        self._own_s, self._wait_s = [0.0] * len(self._nodes), [0.0] * len(self._nodes)


def _median(values: Sequence[float]) -> float:
    """Returns the lower of the two in the middle: of two nodes, one may be slow as a whole."""
    return sorted(values)[(len(values) - 1) // 2]
