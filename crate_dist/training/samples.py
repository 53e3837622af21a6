"""Draws what goes into a model and what comes out wrong: training images as it sees them, and its surest mistakes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from crate_dist.data.decode import Pixels
from crate_dist.data.index import ShardIndex
from crate_dist.evaluation.accuracy import class_text
from crate_dist.evaluation.mistakes import Mistake
from crate_dist.training.mixing import Targets
from crate_dist.whitebox.sheets import Captioned, captioned

SHOWN = 12
TRAINING, MISTAKES = "samples/training", "samples/mistakes"
"""The names of these pictures."""


def training_picture(images: torch.Tensor, labels: torch.Tensor | Targets, index: ShardIndex) -> dict[str, Pixels]:
    """Draws the first images of a micro-batch, (n, height, width, 3) from 0 to 255, each with its label's class.

    Mixed ones have both their classes, and the share of each.
    """
    pixels = images[:SHOWN].round().to(torch.uint8).cpu().numpy()
    if isinstance(labels, Targets):
        both = zip(labels.labels[:SHOWN].tolist(), labels.others[:SHOWN].tolist(), strict=True)
        shares = labels.share, 1 - labels.share
        said = [tuple(f"{s:.0%}  {_named(index, one)}" for s, one in zip(shares, pair, strict=True)) for pair in both]
    else:
        said = [(_named(index, label),) for label in labels[:SHOWN].tolist()]
    made = "cropped, augmented and mixed" if isinstance(labels, Targets) else "cropped and augmented"
    shown = [Captioned(one, text) for one, text in zip(pixels, said, strict=True)]
    return {TRAINING: captioned(shown, f"training images as the model sees them: {made}, with their labels")}


def mistakes_picture(mistakes: Sequence[Mistake], index: ShardIndex) -> dict[str, Pixels]:
    """Draws wrong predictions with their probabilities; nothing where there are none."""
    shown = [
        Captioned(
            one.pixels,
            (
                f"{one.p_predicted:.0%}  {_named(index, one.predicted)}",
                f"{one.p_label:.1%}  labelled {_named(index, one.label)}",
            ),
        )
        for one in mistakes
    ]
    title = "the surest of the wrong predictions on rank 0's validation images, with their probabilities"
    return {MISTAKES: captioned(shown, title)} if shown else {}


def _named(index: ShardIndex, label: int) -> str:
    """Names a class by its name alone: there is no room for its id."""
    names = index.class_names
    return names[label] if label < len(names) else class_text(index.classes, names, label)
