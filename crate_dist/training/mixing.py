"""Mixes the training images of a step by twos: mixup (Zhang et al., 1710.09412) and cutmix (Yun et al., 1905.04899).

    mixup     λ x + (1 - λ) x', λ from Beta(α, α)
    cutmix    x with a box of x' in it, of sides √(1 - λ) of the image's, cut at its edges; λ is then what is left of x
    target    λ y + (1 - λ) y', of labels that are smoothed each

λ, the choice between the two, the box and the way to the partner are drawn once per step, as in both papers, and are
functions of (seed, step). Partners lie in the same `train.group` neighbouring images of the batch as the order lays it
out, and every micro-batch holds groups whole: neither ranks nor accumulation change a pixel or a target.

What is drawn is known on the host, and nothing here waits for the device. Pixels are mixed before they are normalised,
mixup in fp32: that is the same function, since normalising is affine and λ + (1 - λ) = 1, and there is one rounding.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crate_dist.config import Recipe
from crate_dist.data.feed import to_device
from crate_dist.data.loader import Batch
from crate_dist.data.order import Int64, hash64

_SALT = 4


class Targets(NamedTuple):
    """What mixed images show: `share` of each the class in `labels`, the rest the one in `others`; both int64 (n,)."""

    labels: Tensor
    others: Tensor
    share: float

    def to(self, device: torch.device, non_blocking: bool = False) -> Targets:
        """Returns the same on the device."""
        labels, others = (part.to(device, non_blocking=non_blocking) for part in (self.labels, self.others))
        return Targets(labels, others, self.share)

    @property
    def heavier(self) -> Tensor:
        """The classes with the larger share, (n,)."""
        return self.labels if self.share >= 0.5 else self.others

    def cross_entropy(self, logits: Tensor, smoothing: float) -> Tensor:
        """Returns the mean cross entropy, 0-d, of logits (n, classes); no targets of that size are made.

        smoothing: share of each of both labels that is spread over all classes
        """
        log_p = F.log_softmax(logits, dim=1)
        mixed = self.share * F.nll_loss(log_p, self.labels) + (1 - self.share) * F.nll_loss(log_p, self.others)
        return (1 - smoothing) * mixed - smoothing * log_p.mean()


MixedBatch = tuple[Tensor, Targets]
"""Images with values from 0 to 255, uint8 or fp32 (n, height, width, 3), and what they show."""


@dataclass(frozen=True)
class Draw:
    """What all images of a step have in common.

    share: λ, of an image itself; 1.0: nothing is mixed
    box: (top, bottom, left, right) of the rectangle that cutmix takes from the partner; None: mixup
    way: from 0, how far in its group the partner is, beside the next
    """

    share: float
    box: tuple[int, int, int, int] | None
    way: int


class Mixing:
    """The mixing of a recipe, [mix]."""

    def __init__(self, recipe: Recipe) -> None:
        self._mix, self._seed, self._group = recipe.mix, recipe.train.seed, recipe.train.group

    def mixed(self, batch: Batch, step: int) -> tuple[Tensor, Tensor] | MixedBatch:
        """Mixes a micro-batch of the step after `step`, and leaves what it is given as it is.

        Returns the batch's images and labels themselves where the step does not mix.
        """
        images, labels, samples = batch.images, batch.labels, batch.samples
        draw = self.draw(step, images.shape[1]) if self._mix.enabled else None
        if draw is None or draw.share == 1:
            return images, labels
        assert samples is not None
        rows = to_device(partners(samples, self._group, draw.way), images.device)
        if draw.box is None:
            mixed = torch.lerp(images.float(), images[rows].float(), 1 - draw.share)
        else:
            top, bottom, left, right = draw.box
            mixed = images.clone()
            mixed[:, top:bottom, left:right] = images[:, top:bottom, left:right][rows]
        return mixed, Targets(labels, labels[rows], draw.share)

    def draw(self, step: int, side: int) -> Draw:
        """Draws for the step after `step`, and images of `side` pixels."""
        rng = random.Random(int(hash64(self._seed, step, _SALT)[0]))
        mixes, switch, y, x, way = (rng.random() for _ in range(5))
        if mixes >= self._mix.probability:
            return Draw(1.0, None, 0)
        cuts = self._mix.cutmix > 0 and (self._mix.mixup == 0 or switch < self._mix.switch)
        alpha = self._mix.cutmix if cuts else self._mix.mixup
        share, box = rng.betavariate(alpha, alpha), None
        if cuts:
            box = box_of(share, side, int(y * side), int(x * side))
            share = 1 - (box[1] - box[0]) * (box[3] - box[2]) / side**2
        return Draw(share, box, int(way * (self._group - 1)))


def box_of(share: float, side: int, y: int, x: int) -> tuple[int, int, int, int]:
    """Returns (top, bottom, left, right) of 1 - share of a square's area around (y, x), cut where the square ends.

    But for the cut its sides are even, as in CRATE-α's code and in timm 0.4.12, with which ToST was trained, to 0.9.16;
    timm 1.0.31 has odd ones too.
    """
    half = int(side * math.sqrt(1 - share)) // 2
    (top, bottom), (left, right) = ((max(centre - half, 0), min(centre + half, side)) for centre in (y, x))
    return top, bottom, left, right


def partners(samples: Int64, group: int, way: int) -> Int64:
    """Returns for each row, (n,), the row of its partner: 1 + way further on, round about in its group.

    The same sample, which augmentation has repeated or a new epoch brought back, is passed over for the next one. Where
    the group has no other, the row is its own partner.
    """
    ids = samples.reshape(-1, group)
    place = np.arange(group)
    found = np.broadcast_to(place, ids.shape).copy()
    open_ = np.ones_like(ids, dtype=bool)
    for further in range(group - 1):
        other = (place + 1 + (way + further) % (group - 1)) % group
        takes = open_ & (ids[:, other] != ids)
        found = np.where(takes, other, found)
        open_ &= ~takes
        if not open_.any():
            break
    return (found + group * np.arange(len(ids))[:, None]).reshape(-1)
