"""Lion (Chen et al. 2023, arXiv 2302.06675) in one pass over memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lion_pytorch
import torch
from torch import Tensor

_CHUNK = 1 << 17
"""Elements that are brought to the cores at a time: four fp32 vectors of that length stay in a core's own cache."""


class Lion(lion_pytorch.Lion):
    """lion-pytorch's optimizer, its arguments and state, for the few long vectors that ZeRO has; bit for bit on a CPU.

        c = β₁ m + (1 - β₁) g        p ← (1 - η λ) p - η sign(c)        m ← β₂ m + (1 - β₂) g

    lion-pytorch goes through memory seven times, since each operation takes the whole vector. Here all operations take
    one chunk before the next, on a CPU; on a GPU, compiled, they are one kernel. A step overwrites the gradients.

    As torch's fused AdamW understands them, 0-d tensors on the device of the parameters:

    grad_scale: divides the gradients, which is what clipping does; None: 1
    found_inf: 1: the step changes neither weights nor momentum, whatever is in the gradients; 0 or None: it is taken
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        # What lion-pytorch's step calls for each parameter, with its gradient and momentum, η, λ, β₁ and β₂.
        self.update_fn: Callable[..., None] = self._by_chunks

    def compile(self) -> None:
        """Makes every later update one kernel of torch.compile's, the same up to how it rounds."""
        kernel = torch.compile(_update, dynamic=False)
        rates: dict[torch.device, Tensor] = {}

        def update(p: Tensor, grad: Tensor, exp_avg: Tensor, lr: float, *numbers: float) -> None:
            # A rate that changes must not be a constant of the kernel, nor a number that the host copies to the device,
            # which waits for it: filling takes it along with a launch.
            rate = rates.setdefault(p.device, torch.zeros((), dtype=torch.float64, device=p.device)).fill_(lr)
            kernel(p, grad, exp_avg, self._factor(), self.found_inf, rate, *numbers)

        self.update_fn = update

    def _by_chunks(self, p: Tensor, grad: Tensor, exp_avg: Tensor, *numbers: float) -> None:
        tensors, factor = (p, grad, exp_avg), self._factor()
        if p.device.type != "cpu" or not all(tensor.is_contiguous() for tensor in tensors):
            return _update(*tensors, factor, self.found_inf, *numbers)
        chunks = (tensor.view(-1).split(_CHUNK) for tensor in tensors)
        for p, grad, exp_avg in zip(*chunks, strict=True):
            _update(p, grad, exp_avg, factor, self.found_inf, *numbers)
        return None

    def _factor(self) -> Tensor | None:
        return None if self.grad_scale is None else self.grad_scale.reciprocal()


def _update(
    p: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    factor: Tensor | None,
    found_inf: Tensor | None,
    lr: float | Tensor,
    weight_decay: float,
    beta1: float,
    beta2: float,
) -> None:
    if factor is not None:
        grad.mul_(factor)
    kept: float | Tensor = beta2
    if found_inf is not None:
        # A step that must not be taken is one without gradient, at rate 0, that keeps the whole momentum.
        grad.masked_fill_(found_inf > 0, 0.0)
        taken = 1 - found_inf.double()
        lr, kept = taken * lr, 1 - taken * (1 - beta2)
    direction = (exp_avg * beta1).add_(grad, alpha=1 - beta1).sign_()
    p.mul_(1 - lr * weight_decay)
    p.sub_(direction.mul_(lr))
    exp_avg.mul_(kept).add_(grad, alpha=1 - beta2)
