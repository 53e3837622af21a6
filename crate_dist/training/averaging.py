"""Averages the weights over the steps, this rank's part of them, in fp32, and the buffers as if they were weights.

    mean ← d mean + (1 - d) weights        d = optim.ema_decay, after every optimizer step that was taken

It begins with the weights that the run begins with, whose share after n steps is dⁿ, and d does not grow from a smaller
one as it does elsewhere: timm's ModelEma up to 0.4.12 does the same, by which the published ToST was trained.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_LATE = 0.05


class Average:
    """An exponential moving average of a rank's partitions and of the model's buffers.

    partitions: fp32, one per parameter group, as ZeRO cuts them; buffers: by name, the same on all ranks
    """

    def __init__(self, partitions: Sequence[Tensor], buffers: Mapping[str, Tensor], decay: float) -> None:
        self._decay = decay
        self.partitions = [part.detach().clone() for part in partitions]
        self.buffers = {name: buffer.clone() for name, buffer in buffers.items()}

    @torch.no_grad()
    def update(self, partitions: Sequence[Tensor], buffers: Mapping[str, Tensor], not_finite: Tensor) -> None:
        """Takes up the weights after a step, in one pass over memory.

        not_finite: 0-d, on the device: of 1 nothing changes, which the host need not know
        """
        rate = (1 - self._decay) * (1 - not_finite)
        for mean, part in zip(self.partitions, partitions, strict=True):
            mean.lerp_(part.detach(), rate)
        for name, buffer in buffers.items():
            mean = self.buffers[name]
            if mean.is_floating_point():
                mean.lerp_(buffer, rate)
            else:  # a count
                mean.copy_(buffer)


def warn_of_short_run(decay: float, steps: int) -> None:
    """Says when an average over so many steps will have the first weights in it to a share that is felt."""
    share = decay**steps
    if decay and share > _LATE:
        logger.warning(
            "optim.ema_decay=%g averages over about the last %s steps, and the run has %s: %.0f %% of the average will "
            "be the weights that it begins with; %.4g would leave 1 %% of them",
            decay,
            f"{1 / (1 - decay):,.0f}",
            f"{steps:,}",
            100 * share,
            0.01 ** (1 / max(steps, 1)),
        )
