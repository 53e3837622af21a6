"""Gives what rank 0 measures to every tracker of the run: the same names and the same steps to each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from crate_dist.data.decode import Pixels


class Tracker(Protocol):
    """Something that shows curves. Values come by the names that metrics.jsonl has; how they are shown is its own."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Takes one point of each of these curves."""

    def layers(self, name: str, values: Sequence[float], step: int) -> None:
        """Takes one value of every layer, the first layer first."""

    def text(self, name: str, text: str, step: int) -> None:
        """Takes a text in Markdown."""

    def picture(self, name: str, pixels: Pixels, step: int) -> None:
        """Takes a picture, uint8 (height, width, 3)."""

    def sync(self) -> None:
        """Brings everything to disk, so that a checkpoint never knows more than the tracker does."""

    def close(self) -> None:
        """Ends it."""


class Trackers:
    """The trackers of a run as one; none of them on every rank but 0."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Gives one point of each of these curves."""
        for tracker in self._trackers:
            tracker.scalars(values, step)

    def layers(self, name: str, values: Sequence[float], step: int) -> None:
        """Gives one value of every layer, the first layer first."""
        for tracker in self._trackers:
            tracker.layers(name, values, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Gives a text in Markdown."""
        for tracker in self._trackers:
            tracker.text(name, text, step)

    def picture(self, name: str, pixels: Pixels, step: int) -> None:
        """Gives a picture, uint8 (height, width, 3)."""
        for tracker in self._trackers:
            tracker.picture(name, pixels, step)

    def sync(self) -> None:
        """Brings everything to disk."""
        for tracker in self._trackers:
            tracker.sync()

    def close(self) -> None:
        """Ends them all."""
        for tracker in self._trackers:
            tracker.close()
