"""Calibration: whether a model that is 80 % sure is right in 80 % of the cases.

The confidence of a prediction is the highest softmax probability. The expected calibration error (ECE; Guo et al. 2017,
arXiv 1706.04599, equation 5) is the mean distance of confidence and accuracy over 15 equal bins of confidence, weighted
by their samples. It depends on the number of bins, and compares models only at the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from crate_dist.evaluation.accuracy import Predictions

BINS = 15
_EVEN = 0.5  # per cent between confidence and accuracy that nobody would call too sure


@dataclass(frozen=True)
class Bin:
    """Samples whose confidence is above `low` and at most `high`; mean confidence and top-1 in per cent."""

    low: float
    high: float
    samples: int
    confidence: float
    top1: float


@dataclass(frozen=True)
class Calibration:
    """Expected calibration error, mean confidence and top-1, all in per cent, and the bins that have samples."""

    ece: float
    confidence: float
    top1: float
    bins: tuple[Bin, ...]

    def describe(self) -> str:
        """Says it in a line."""
        gap = self.confidence - self.top1
        how = "as sure as right" if abs(gap) < _EVEN else "too sure" if gap > 0 else "not sure enough"
        return f"calibration: ECE {self.ece:.2f} % in {BINS} bins, mean confidence {self.confidence:.2f} %: {how}"


class Calibrator:
    """A count of confidences and hits; a Tally."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(BINS, 3, dtype=torch.float64, device=device)

    def add(self, seen: Predictions) -> None:
        """Counts one batch."""
        confidence = seen.logits.softmax(dim=1).amax(dim=1)
        number = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
        hits = seen.ranked[:, 0] == seen.labels
        self._sums.index_add_(0, number, torch.stack([torch.ones_like(confidence), confidence, hits], dim=1).double())

    def total(self) -> Calibration:
        """Returns the calibration over all ranks' samples. A collective."""
        dist.all_reduce(self._sums)
        sums = self._sums.cpu().numpy()
        samples, confidence, hits = sums.T
        total = samples.sum()
        bins = tuple(
            Bin(n / BINS, (n + 1) / BINS, int(count), 100 * sure / count, 100 * hit / count)
            for n, (count, sure, hit) in enumerate(sums.tolist())
            if count
        )
        gap, sure, hit = (100 * float(part.sum() / total) for part in (abs(confidence - hits), confidence, hits))
        return Calibration(gap, sure, hit, bins)
