"""Accuracies class by class and confusions are what counting one sample after the other gives."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from crate_dist.data.folder import ImageFolder
from crate_dist.evaluation.accuracy import ClassAccuracies, ClassCounts, Predictions, label_ranks
from crate_dist.evaluation.calibration import BINS, Calibration, Calibrator
from crate_dist.evaluation.real import RealCounts, RealLabels, Reassessed
from crate_dist.world import World
from tests.ranks import spawn

CLASSES = 7
KNOWN = 9
"""The model knows more classes than the split has."""


def predictions() -> tuple[np.ndarray, np.ndarray]:
    """Labels (101,), none of class 5, and the five best guesses of each (101, 5)."""
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 3, 4, 6], 101)
    liked = np.where(np.arange(101)[:, None] % 3, -1, labels[:, None]) == np.arange(KNOWN)
    return labels, np.argsort(-(rng.random((101, KNOWN)) + liked), axis=1)[:, :5]


def logits_of(ranked: np.ndarray) -> np.ndarray:
    """Scores (101, KNOWN), fp32, of which the best one is that of the first guess."""
    scores = np.random.default_rng(1).normal(0, 2, (101, KNOWN)).astype(np.float32)
    np.put_along_axis(scores, ranked[:, :1], scores.max(axis=1, keepdims=True) + 0.1, axis=1)
    return scores


def reassessed() -> tuple[ImageFolder, RealLabels]:
    """Images by ImageNet's names, and labels for them, none, one or two; of classes that run backwards in these."""
    names = [f"c0/ILSVRC2012_val_{101 - number:08d}.JPEG" for number in range(101)]
    rows = np.zeros(101, dtype=[("label", "<i4")])
    labels = [[image % KNOWN, (image + 1) % KNOWN][: image % 3] for image in range(1, 102)]
    folder = ImageFolder(Path("val"), names, rows, [f"c{label}" for label in range(KNOWN)])
    return folder, RealLabels(labels, np.arange(KNOWN)[::-1])


def tally_on_ranks(world: World, device: torch.device) -> tuple[ClassAccuracies, Calibration, Reassessed]:
    """Each rank takes every so manieth sample, three at a time; of five ranks the last has none."""
    folder, real = reassessed()
    tallies = ClassCounts(CLASSES, device), Calibrator(device), RealCounts(real, folder)
    labels, ranked = (torch.from_numpy(part) for part in predictions())
    logits = torch.from_numpy(logits_of(ranked.numpy()))
    sharing = min(world.world_size, 4)
    images = torch.zeros(len(labels), 1, 1, 3, dtype=torch.uint8)
    mine = range(world.rank, len(labels), sharing) if world.rank < sharing else range(0)
    for first in range(0, len(mine), 3):
        some = list(mine[first : first + 3])
        for tally in tallies:
            tally.add(Predictions(images[some], labels[some], logits[some], ranked[some], np.array(some)))
    return tallies[0].total(), tallies[1].total(), tallies[2].total()


@pytest.mark.spawn
@pytest.mark.parametrize("world_size", [1, 5])
def test_counts_are_those_of_all_samples_at_any_number_of_ranks(world_size: int) -> None:
    labels, ranked = predictions()
    wrong = Counter((int(a), int(b[0])) for a, b in zip(labels, ranked, strict=True) if a != b[0])
    expected = sorted(((-count, *pair) for pair, count in wrong.items()))
    logits = logits_of(ranked).astype(float)
    confidence = np.exp(logits.max(axis=1)) / np.exp(logits).sum(axis=1)
    hits = ranked[:, 0] == labels
    bins = np.ceil(confidence * BINS) - 1
    gaps = [abs(confidence[bins == b].sum() - hits[bins == b].sum()) for b in range(BINS)]
    images = [101 - number for number in range(101)]
    right = [
        KNOWN - 1 - int(guess) in [image % KNOWN, (image + 1) % KNOWN][: image % 3]
        for guess, image in zip(ranked[:, 0], images, strict=True)
    ]
    for result, calibration, real in spawn(tally_on_ranks, world_size):
        assert calibration.ece == pytest.approx(100 * sum(gaps) / 101, rel=1e-5)
        assert calibration.confidence == pytest.approx(100 * confidence.mean(), rel=1e-5)
        assert calibration.top1 == pytest.approx(100 * hits.mean())
        assert sum(one.samples for one in calibration.bins) == 101
        assert real.samples == sum(image % 3 > 0 for image in images)
        assert real.top1 == pytest.approx(100 * sum(right) / real.samples)
        assert result.samples.tolist() == [int((labels == c).sum()) for c in range(CLASSES)]
        assert result.top1.tolist() == [int((ranked[labels == c, 0] == c).sum()) for c in range(CLASSES)]
        assert result.top5.tolist() == [int((ranked[labels == c] == c).sum()) for c in range(CLASSES)]
        found = zip((-result.count).tolist(), result.true.tolist(), result.predicted.tolist(), strict=True)
        assert list(found) == expected
        assert max(result.predicted) >= CLASSES


def test_the_worst_class_comes_first_and_one_without_samples_not_at_all() -> None:
    counts = np.array([[4, 2, 4], [4, 2, 3], [0, 0, 0], [10, 1, 1], [4, 2, 3]])
    none = np.array([], dtype=np.int64)
    samples, top1, top5 = counts.T
    by_class = ClassAccuracies(samples, top1, top5, none, none, none)
    assert by_class.worst_first().tolist() == [3, 1, 4, 0]
    records = by_class.records(list("abcde"), ["one", "two", "three", "four", "five"])
    assert records[3] == {"label": 3, "class": "d", "name": "four", "samples": 10, "top1": 10.0, "top5": 10.0}
    assert records[2]["top1"] is records[2]["top5"] is None


def test_confusions_name_both_classes_and_their_share_of_the_true_one() -> None:
    samples = np.array([8, 5, 5])
    by_class = ClassAccuracies(samples, samples, samples, np.array([0, 1]), np.array([1, 4]), np.array([2, 1]))
    first, second = by_class.confusions(["n1", "n2", "n3"], ["crane", "crane", "n3"])
    assert (first["true"], first["predicted"], first["count"], first["share"]) == ("n1 crane", "n2 crane", 2, 25.0)
    assert (second["predicted"], second["predicted_label"], second["share"]) == ("class 4", 4, 20.0)
    assert by_class.confusions(["n1", "n2", "n3"], ["crane", "crane", "n3"], most=1) == [first]


def test_places_count_the_classes_before_the_right_one() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.3, 0.3], [0.3, 0.3, 0.3]])
    assert label_ranks(scores, torch.tensor([2, 0, 2])).tolist() == [1, 0, 2]
