"""ReaL: ImageNet's validation images labelled anew, each with all classes that it shows (Beyer et al. 2020).

"Are we done with ImageNet?", arXiv 2006.07159. real.json, published with it, is a list of 50,000 lists of classes, in
the order of ILSVRC2012_val_00000001 …; classes are numbered in the order of their WordNet ids. A prediction is right
when it is among them; an image that shows none of the classes has an empty list, and does not count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crate_dist.checkpoint.trained import class_ids_are_numbers
from crate_dist.data.folder import Indexed, open_reader
from crate_dist.distributed import gather_objects
from crate_dist.evaluation.accuracy import Predictions
from crate_dist.evaluation.matching import are_wordnet_ids
from crate_dist.evaluation.on_ranks import CannotMeasure

IMAGES, CLASSES = 50_000, 1000
_NUMBER = re.compile(r"ILSVRC2012_val_([0-9]{8})")


@dataclass(frozen=True)
class Reassessed:
    """Accuracy in per cent against the ReaL labels, and the number of samples that have some."""

    top1: float
    samples: int


@dataclass(frozen=True)
class RealLabels:
    """The labels of the file, and how a split's classes are numbered in it.

    labels: by image; numbers: int64 (classes,), by label of the split
    """

    labels: Sequence[Sequence[int]]
    numbers: np.ndarray

    @classmethod
    def read(cls, path: Path, index: Indexed) -> RealLabels:
        """Reads the file for a split of ImageNet's validation images.

        Raises CannotMeasure: it is none, or the split has other classes, calls them otherwise, or does not tell the
        names of its images.
        """
        try:
            labels = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CannotMeasure(f"--real {path} is no JSON: {error}") from error
        lists = isinstance(labels, list) and all(
            isinstance(some, list) and all(type(label) is int and 0 <= label < CLASSES for label in some)
            for some in labels
        )
        if not lists or len(labels) != IMAGES:
            raise CannotMeasure(
                f"--real {path} is not the file of the ReaL labels: expected a list of {IMAGES:,} lists of classes "
                f"from 0 to {CLASSES - 1}"
            )
        if index.num_classes != CLASSES:
            raise CannotMeasure(f"--real is for ImageNet's {CLASSES:,} classes; {index.place} has {index.num_classes}")
        image_number(open_reader(index).name(0), index)
        return cls(labels, _numbers(index))


class RealCounts:
    """A count of predictions that are among the ReaL labels; a Tally of samples whose numbers are told."""

    def __init__(self, real: RealLabels, index: Indexed) -> None:
        self._real, self._index, self._reader = real, index, open_reader(index)
        self._images: list[int] = []
        self._predicted: list[Tensor] = []

    def add(self, seen: Predictions) -> None:
        """Counts one batch. Raises CannotMeasure for an image whose name is not one of ImageNet's."""
        assert seen.samples is not None
        # Now, when their shards are in memory: the headers lie beside the images.
        self._images += [image_number(self._reader.name(sample), self._index) for sample in seen.samples.tolist()]
        self._predicted.append(seen.ranked[:, 0])

    def total(self) -> Reassessed:
        """Returns the accuracy over all ranks' samples. A collective."""
        predicted = torch.cat(self._predicted).tolist() if self._predicted else []
        hits = samples = 0
        for image, label in zip(self._images, predicted, strict=True):
            right = self._real.labels[image - 1]
            samples += bool(right)
            hits += label < CLASSES and int(self._real.numbers[label]) in right
        hits, samples = (sum(part) for part in zip(*gather_objects((hits, samples)), strict=True))
        return Reassessed(100 * hits / samples if samples else float("nan"), samples)


def _numbers(index: Indexed) -> np.ndarray:
    """Returns the numbers of ImageNet's classes in the file, int64 (classes,), by label. Raises CannotMeasure."""
    names = list(index.classes)
    if class_ids_are_numbers(names):
        return np.arange(CLASSES)
    if are_wordnet_ids(names):
        order = {name: number for number, name in enumerate(sorted(names))}
        return np.array([order[name] for name in names])
    raise CannotMeasure(
        f"--real numbers the classes in the order of their WordNet ids, as n01440764, and {index.place} calls its "
        f"first {names[0]!r}: which is which cannot be told; "
        "`data_prep/index.py DIR --classes FILE` gives the shards the ids"
    )


def image_number(name: str, index: Indexed) -> int:
    """Returns the number, 1 … 50,000, in the original name of a validation image. Raises CannotMeasure."""
    found = _NUMBER.search(name)
    if found is None or not 1 <= int(found[1]) <= IMAGES:
        raise CannotMeasure(
            f"--real goes by the names of ImageNet's validation images, as ILSVRC2012_val_00000001, and {index.place} "
            f"has {name or 'an image without a name'}; shards from data_prep/imagenet.py keep them"
        )
    return int(found[1])
