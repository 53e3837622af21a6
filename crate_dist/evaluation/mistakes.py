"""Keeps the wrong predictions that a model was surest of: what a person looks at to find out what it has not learned,
or which labels are wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crate_dist.data.decode import Pixels
from crate_dist.evaluation.accuracy import Predictions


@dataclass(frozen=True, eq=False)
class Mistake:
    """An image as the model saw it, uint8 (height, width, 3), its label, the prediction, and their probabilities."""

    pixels: Pixels
    label: int
    predicted: int
    p_label: float
    p_predicted: float


class Mistakes:
    """The `most` of this rank with the highest probability, kept on the device without waiting for it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: tuple[Tensor, ...] | None = None

    def add(self, predictions: Predictions) -> None:
        """Looks at a batch. What is not finite is no mistake."""
        images, labels, logits, ranked, _ = predictions
        probabilities = logits.softmax(dim=1)
        predicted = ranked[:, 0]
        sure = probabilities.gather(1, predicted[:, None])[:, 0]
        score = torch.where((predicted != labels) & sure.isfinite(), sure, -1.0)
        of_label = probabilities.gather(1, labels[:, None])[:, 0]
        first = score.topk(min(self._most, len(score))).indices
        found = tuple(part[first] for part in (score, labels, predicted, of_label, images))
        if self._kept is not None:
            both = tuple(torch.cat(parts) for parts in zip(self._kept, found, strict=True))
            first = both[0].topk(min(self._most, len(both[0]))).indices
            found = tuple(part[first] for part in both)
        self._kept = found

    def found(self) -> list[Mistake]:
        """Returns them, the surest first."""
        if self._kept is None:
            return []
        score, labels, predicted, of_label, images = (part.cpu() for part in self._kept)
        numbers = zip(
            images.numpy(), labels.tolist(), predicted.tolist(), of_label.tolist(), score.tolist(), strict=True
        )
        return [Mistake(*one) for one in numbers if one[-1] >= 0]
