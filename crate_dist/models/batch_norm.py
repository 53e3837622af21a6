"""Batch norm whose statistics are those of a group of images of a named size, not of whatever a rank has at a time.

Ioffe and Szegedy, "Batch Normalization" (arXiv 1502.03167). What one image becomes depends on its group alone, so that
the cluster and the micro-batch do not change the mathematics. In training the running statistics stand still: each
pass adds what its groups had to a sum, which the engine takes once per optimizer step, from all ranks:

    flat = statistics(model); all_reduce(flat); take_statistics(model, flat)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STATISTICS = {"running_mean": torch.float32, "running_var": torch.float32, "num_batches_tracked": torch.int64}
"""Names of the running statistics among a module's weights, and their types, whatever those of the weights are."""


class GroupedBatchNorm(nn.BatchNorm2d):
    """Batch norm over each `group` neighbouring images of a batch in training; over running statistics otherwise.

    group: images; None takes the whole batch for one
    The running statistics stay fp32 whatever type the weights are cast to, and are in the state dict under torch's
    names. What has been seen since they were updated is not in it: a checkpoint is taken between two steps.
    """

    group: int | None = None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    pending: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        # Sums over groups: of their means, of their variances, and how many there were. A device is named because no
        # file of weights fills it in a model that was built on "meta".
        self.register_buffer("pending", torch.zeros(2 * channels + 1, device="cpu"), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, rows, cols) -> the same; statistics in fp32, of fp64 in fp64. Channels that lie last stay there.

        Raises ValueError in training when the batch does not divide into groups.
        """
        exact = torch.promote_types(x.dtype, torch.float32)
        scale, shift = self.weight.to(exact), self.bias.to(exact)
        if not self.training:
            mean, var = self.running_mean.to(exact), self.running_var.to(exact)
            return F.batch_norm(x, mean, var, scale, shift, eps=self.eps)
        images = len(x)
        group = self.group or images
        if images % group:
            fitting = " or ".join(str(number * group) for number in (images // group, images // group + 1) if number)
            raise ValueError(
                f"{images} images do not divide into groups of {group} for batch norm: a micro-batch is a multiple of "
                f"the group, such as {fitting}"
            )
        groups = images // group
        # The groups become channels: one call normalises all of them, and nothing is copied where there is one. Seen
        # with the channels last, in which order they are copied where there are more.
        mean, var = torch.zeros(2, groups * self.num_features, dtype=exact, device=x.device)
        pixels = x.permute(0, 2, 3, 1).unflatten(0, (groups, group)).movedim(0, 3).flatten(3)
        x = pixels.permute(0, 3, 1, 2)
        x = F.batch_norm(x, mean, var, scale.repeat(groups), shift.repeat(groups), True, 1.0, self.eps)
        with torch.no_grad():  # what a momentum of 1 has left in them: each group's mean and unbiased variance
            sums = [statistic.view(groups, -1).sum(0) for statistic in (mean, var)]
            self.pending += torch.cat((*sums, sums[0].new_full((1,), groups)))
        pixels = x.permute(0, 2, 3, 1).unflatten(3, (groups, -1)).movedim(3, 0).flatten(0, 1)
        return pixels.permute(0, 3, 1, 2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GroupedBatchNorm:
        """Casts and moves as torch does, but that the statistics have their own types afterwards."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, now in self._buffers.items():
            was = before[name]
            assert now is not None
            assert was is not None
            kept = STATISTICS.get(name, was.dtype)
            if now.dtype != kept:
                self._buffers[name] = was.to(now.device, kept)
        return self


def statistics(model: nn.Module) -> Tensor:
    """Returns what the model's batch norms have seen since `take_statistics`: flat, fp32, empty where there are none.

    Sums over groups of images, and their number: of several ranks, they are added.
    """
    pending = [norm.pending for norm in _norms(model)]
    return torch.cat(pending) if pending else torch.empty(0)


@torch.no_grad()
def take_statistics(model: nn.Module, flat: Tensor) -> None:
    """Updates the running statistics by the mean over groups of `flat`, and forgets what was seen.

    flat: as of `statistics`; one of zeros changes no running statistic, as for a step that is left out
    Waits for no device. Raises ValueError when `flat` has another size than this model's.
    """
    norms = _norms(model)
    sizes = [norm.pending.numel() for norm in norms]
    if flat.numel() != sum(sizes):
        raise ValueError(f"expected {sum(sizes)} statistics for the batch norms of this model, got {flat.numel()}")
    for norm, sums in zip(norms, flat.split(sizes), strict=True):
        groups = sums[-1]
        weight = norm.momentum * (groups > 0).float()
        mean, var = (sums[:-1] / groups.clamp(min=1)).chunk(2)
        norm.running_mean.lerp_(mean, weight)
        norm.running_var.lerp_(var, weight)
        norm.num_batches_tracked += groups > 0
        norm.pending.zero_()


def _norms(model: nn.Module) -> list[GroupedBatchNorm]:
    return [module for module in model.modules() if isinstance(module, GroupedBatchNorm)]
