"""Counts and lists the samples that cannot be read: those replaced in training, and those left out of evaluations."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from crate_dist.config import Recipe
from crate_dist.data.reader import BadSample
from crate_dist.distributed import gather_objects
from crate_dist.errors import UserError
from crate_dist.files import AppendedFile
from crate_dist.run.folder import RunFolder
from crate_dist.run.lock import Tenure
from crate_dist.world import World

logger = logging.getLogger(__name__)

_NAMED = 16
_ALWAYS_LET_PASS = 8  # the first few of a run say nothing yet about the share of them


class TooManyBadSamples(UserError):
    """More samples than data.max_bad_fraction could not be read."""


class BadSamples:
    """The bad samples of this start; rank 0 writes them to the run folder, one line each.

    replaced: how many of them this rank has met in training
    """

    def __init__(self, folder: RunFolder, recipe: Recipe, world: World, tenure: Tenure) -> None:
        self._path, self._recipe, self._world, self._tenure = folder.bad_samples, recipe, world, tenure
        self._file: AppendedFile | None = None
        self._unwritten: list[BadSample] = []
        self._unreadable: set[BadSample] = set()
        self.replaced = 0

    def add_replaced(self, bad: Sequence[BadSample]) -> None:
        """Takes up what a step of this rank was made without; `report` writes it down."""
        self._unwritten += bad
        self.replaced += len(bad)
        for item in bad:
            logger.warning("replaced %s: %s", _name(item), item.reason)

    def report(self, images: int) -> None:
        """Writes down what all ranks have replaced since the last report. A collective.

        images: of this rank's steps so far. Raises TooManyBadSamples, on all ranks, when one of them had too many.
        """
        largest = self._recipe.data.max_bad_fraction
        problem = (
            f"{self.replaced} of the first {images} samples of rank {self._world.rank} do not decode, more "
            f"than data.max_bad_fraction = {largest}; they are listed in {self._path}"
        )
        too_many = self.replaced > max(_ALWAYS_LET_PASS, largest * images)
        every = gather_objects((self._unwritten, problem if too_many else ""))
        self._unwritten = []
        split = self._recipe.data.train_split
        self._write(
            {"split": split, "rank": rank, **item._asdict()} for rank, (bad, _) in enumerate(every) for item in bad
        )
        for _, problem in every:
            if problem:
                raise TooManyBadSamples(problem)

    def add_unreadable(self, bad: Sequence[BadSample], problem: str) -> None:
        """Writes down what an evaluation left out, the same on all ranks; each is named once in a start.

        Raises TooManyBadSamples for a `problem`.
        """
        split = self._recipe.data.val_split
        new = [item for item in bad if item not in self._unreadable]
        self._unreadable.update(new)
        if new:
            self._write({"split": split, **item._asdict()} for item in new)
        for item in new[:_NAMED] if self._world.is_main else ():
            logger.warning("left out of %s: %s: %s", split, _name(item), item.reason)
        if len(new) > _NAMED and self._world.is_main:
            logger.warning("and %d more, listed in %s", len(new) - _NAMED, self._path)
        if problem:
            raise TooManyBadSamples(
                f"{split}: {problem}; that is more than data.max_bad_fraction = {self._recipe.data.max_bad_fraction}; "
                f"they are listed in {self._path}"
            )

    def _write(self, items: Iterable[Mapping[str, Any]]) -> None:
        if self._world.is_main:
            self._file = self._file or AppendedFile(self._path, self._tenure.check)
            self._file.append("".join(json.dumps(item) + "\n" for item in items).encode())


def _name(item: BadSample) -> str:
    """Names a sample in one line: its name is the shard's own, and a line break in it would begin another message."""
    return repr(f"{item.key} of {item.shard}")[1:-1]
