"""Accuracy of predictions: over a whole split, and class by class, with what is taken for what.

A sample that could not be read does not count in either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from crate_dist.data.feed import Feed
from crate_dist.data.loader import Batch
from crate_dist.data.order import Int64
from crate_dist.data.reader import BadSample
from crate_dist.distributed import Left, gather_objects

_LABEL_BITS = 32


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Returns the number of classes that stand before the right one, int64 (n,): 0 hits in top-1, up to 4 in top-5.

    scores: (n, classes), finite; labels: int64 (n,). Of classes with equal scores the one of lower number stands first.
    """
    right = scores.gather(1, labels[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    return ((scores > right) | ((scores == right) & earlier)).sum(dim=1)


class Predictions(NamedTuple):
    """What a model says of a batch, but for samples that could not be read; on its device.

    images: uint8 (n, height, width, 3); labels: int64 (n,); logits: fp32 (n, classes)
    ranked: int64 (n, at most 5), the predicted classes, best first
    samples: int64 (n,), their numbers in the split, on the host, where the loader tells them
    """

    images: Tensor
    labels: Tensor
    logits: Tensor
    ranked: Tensor
    samples: Int64 | None = None


class Tally(Protocol):
    """What counts predictions, batch by batch, without waiting for the device."""

    def add(self, seen: Predictions) -> None:
        """Counts one batch."""


@dataclass(frozen=True, eq=False)
class ClassAccuracies:
    """Counts of a split; arrays have one entry per class.

    samples, top1, top5: int64 (classes,), the samples of the class, and those of them that were hit
    true, predicted, count: int64 (pairs,), the classes that were taken for others, most frequent first
    """

    samples: Int64
    top1: Int64
    top5: Int64
    true: Int64
    predicted: Int64
    count: Int64

    def worst_first(self) -> Int64:
        """Returns the classes that have samples: by top-1, then top-5, then number."""
        present = np.flatnonzero(self.samples)
        shares = [hits[present] / self.samples[present] for hits in (self.top5, self.top1)]
        return present[np.lexsort((present, *shares))]

    def records(self, classes: Sequence[str], names: Sequence[str]) -> list[dict[str, Any]]:
        """Returns one record per class, in their order, as in JSON and CSV; accuracies in per cent, or None.

        classes, names: of the split's index
        """
        return [
            {
                "label": label,
                "class": classes[label],
                "name": names[label],
                "samples": int(total),
                "top1": 100 * int(self.top1[label]) / int(total) if total else None,
                "top5": 100 * int(self.top5[label]) / int(total) if total else None,
            }
            for label, total in enumerate(self.samples)
        ]

    def confusions(self, classes: Sequence[str], names: Sequence[str], most: int | None = None) -> list[dict[str, Any]]:
        """Returns the `most` frequent ones, or all, as in JSON; share: per cent of the true class's samples."""
        pairs = zip(self.true[:most].tolist(), self.predicted[:most].tolist(), self.count[:most].tolist(), strict=True)
        return [
            {
                "true_label": true,
                "predicted_label": predicted,
                "true": class_text(classes, names, true),
                "predicted": class_text(classes, names, predicted),
                "count": count,
                "share": 100 * count / int(self.samples[true]),
            }
            for true, predicted, count in pairs
        ]


class ClassCounts:
    """A count of the hits in every class, and of what is taken for what; a Tally.

    Of the confusion matrix only what happened is kept, one number per sample until the end and then one per pair of
    classes that occurs: for 21,000 classes the whole matrix would take 3.5 GB, and be empty nearly everywhere.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        self._counts = torch.zeros(classes, 3, dtype=torch.int64, device=device)
        self._pairs = [torch.empty(0, dtype=torch.int64, device=device)]

    def add(self, seen: Predictions) -> None:
        """Counts one batch."""
        labels, ranked = seen.labels, seen.ranked
        hits = ranked == labels[:, None]
        counts = torch.stack([torch.ones_like(hits[:, 0]), hits[:, 0], hits.any(dim=1)], dim=1)
        self._counts.index_add_(0, labels, counts.long())
        self._pairs.append(labels << _LABEL_BITS | ranked[:, 0])

    def total(self) -> ClassAccuracies:
        """Returns the counts of all ranks. A collective."""
        pairs, times = torch.unique(torch.cat(self._pairs), return_counts=True)
        mine = self._counts.cpu().numpy(), pairs.cpu().numpy(), times.cpu().numpy()
        counts, every_pair, every_times = zip(*gather_objects(mine), strict=True)
        pairs_seen, place = np.unique(np.concatenate(every_pair), return_inverse=True)
        count = np.zeros(len(pairs_seen), dtype=np.int64)
        np.add.at(count, place, np.concatenate(every_times))
        true, predicted = pairs_seen >> _LABEL_BITS, pairs_seen & ((1 << _LABEL_BITS) - 1)
        order = np.lexsort((predicted, true, -count))
        order = order[true[order] != predicted[order]]
        samples, top1, top5 = np.sum(counts, axis=0).T
        return ClassAccuracies(samples, top1, top5, true[order], predicted[order], count[order])


def class_text(classes: Sequence[str], names: Sequence[str], label: int) -> str:
    """Names a class for people: id and name, since ImageNet has two cranes; by number one that the split lacks."""
    if label >= len(classes):
        return f"class {label}"
    return classes[label] if names[label] == classes[label] else f"{classes[label]} {names[label]}"


@dataclass(frozen=True)
class Evaluation:
    """Accuracy in per cent, mean cross-entropy (without smoothing), and the number of samples that count.

    unreadable: number of samples that could not be read and do not count; bad: their names
    """

    top1: float
    top5: float
    loss: float
    samples: int
    unreadable: int
    bad: tuple[BadSample, ...]

    def scalars(self, of: str = "") -> dict[str, float]:
        """Returns the numbers under their names in metrics.jsonl; of: "ema_" for the averaged weights."""
        return {f"val/{of}top1": self.top1, f"val/{of}top5": self.top5, f"val/{of}loss": self.loss}

    def better_than(self, top1: float) -> bool:
        """Tells whether this is the model to keep. Of scores that are no numbers some class is the best too."""
        return math.isfinite(self.loss) and self.top1 > top1

    def problem(self, max_bad_fraction: float) -> str:
        """Says that too few samples could be read for the accuracy to mean much; "" where it is well.

        A few are let pass, whatever their share: 8, or of a small split an eighth.
        """
        total = self.samples + self.unreadable
        if self.unreadable <= max(max_bad_fraction * total, min(8, total / 8)):
            return ""
        first = f"{self.bad[0].key} of {self.bad[0].shard}: {self.bad[0].reason}"
        return f"{self.unreadable:,} of {total:,} samples could not be read, the first one {first}"


@torch.inference_mode()
def evaluate(
    predict: Callable[[torch.Tensor], torch.Tensor],
    batches: Iterable[Batch],
    device: torch.device,
    tallies: Sequence[Tally] = (),
    leave: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Counts over all ranks' batches. A collective, at the end alone: ranks may have different numbers of batches.

    predict: uint8 images (n, height, width, 3) -> logits (n, classes)
    tallies: are told of every batch, where somebody wants to know more
    leave: asked before every batch, whether to make no more of them

    A sample that could not be read does not count, and neither does the one that the loader puts in its place: that is
    counted in its own.

    Raises Left: on all ranks, when one of them has left.
    """
    sums, counts, bad = torch.zeros(3, dtype=torch.float64, device=device), [0, 0, 0], set[BadSample]()
    for batch in Feed(iter(batches), device):
        if leave():
            counts[2] = 1
            break
        images, labels, samples = batch.images, batch.labels, batch.samples
        logits = predict(images).float()
        if batch.replaced:
            bad.update(batch.bad)
            read = [row for row in range(len(labels)) if row not in batch.replaced]
            images, logits, labels = images[read], logits[read], labels[read]
            samples = None if samples is None else samples[read]
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = ranked == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([hits[:, 0].sum().double(), hits.sum().double(), loss.double()])
        counts[0] += len(labels)
        counts[1] += len(batch.replaced)
        for tally in tallies:
            tally.add(Predictions(images, labels, logits, ranked, samples))
    totals = torch.cat([sums, torch.tensor(counts, dtype=torch.float64, device=device)])
    dist.all_reduce(totals)
    top1, top5, loss_sum, samples, unreadable, left = totals.tolist()
    if left:
        raise Left
    # Ranks meet the same ones, where what stands in for a rank's last samples is the next rank's.
    named = tuple(sorted(set[BadSample]().union(*gather_objects(bad)))) if unreadable else ()
    means = 100 * top1 / samples, 100 * top5 / samples, loss_sum / samples
    return Evaluation(*means, int(samples), int(unreadable), named)
