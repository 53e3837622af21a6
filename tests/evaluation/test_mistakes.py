"""The surest mistakes are those of all batches, and none is made up."""

from __future__ import annotations

import torch

from crate_dist.evaluation.accuracy import Predictions
from crate_dist.evaluation.mistakes import Mistakes


def test_the_surest_mistakes_of_all_batches_are_kept_in_any_batching() -> None:
    torch.manual_seed(0)
    images, labels = torch.randint(256, (50, 4, 4, 3), dtype=torch.uint8), torch.randint(5, (50,))
    logits = 3 * torch.randn(50, 5)
    probabilities = logits.softmax(dim=1)
    sure, predicted = probabilities.max(dim=1)
    wrong = [n for n in sure.argsort(descending=True).tolist() if predicted[n] != labels[n]][:6]
    for batch in (1, 7, 50):
        kept = Mistakes(6)
        for part in zip(images.split(batch), labels.split(batch), logits.split(batch), strict=True):
            kept.add(Predictions(*part, part[2].topk(2, dim=1).indices))
        found = kept.found()
        assert [one.label for one in found] == labels[wrong].tolist()
        assert [one.predicted for one in found] == predicted[wrong].tolist()
        for one, number in zip(found, wrong, strict=True):
            assert (torch.from_numpy(one.pixels) == images[number]).all()
            assert abs(one.p_predicted - float(sure[number])) < 1e-6
            assert abs(one.p_label - float(probabilities[number, one.label])) < 1e-6


def test_what_is_right_or_no_number_is_no_mistake() -> None:
    kept = Mistakes(4)
    assert kept.found() == []
    logits = torch.tensor([[0.0, 5.0], [float("nan"), 0.0], [0.0, 5.0]])
    images, labels = torch.zeros(3, 2, 2, 3, dtype=torch.uint8), torch.tensor([1, 0, 0])
    kept.add(Predictions(images, labels, logits, logits.topk(2, dim=1).indices))
    (one,) = kept.found()
    assert (one.label, one.predicted) == (0, 1)
