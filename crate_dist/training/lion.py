"""Lion (Chen et al. 2023, arXiv 2302.06675) in one pass over memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_CHUNK = 1 << 17
"""Elements that are brought to the cores at a time: four fp32 vectors of so many stay in a core's own cache (2 MB)."""


class Lion(torch.optim.Optimizer):
    """The update of lion-pytorch, bit for bit on a CPU, for the few long vectors that ZeRO has.

        c = β₁ m + (1 - β₁) g        p ← (1 - η λ) p - η sign(c)        m ← β₂ m + (1 - β₂) g

    lion-pytorch goes through memory seven times, since each operation takes the whole vector. Here all operations take
    one chunk before the next, on a CPU; on a GPU, compiled, they are one kernel.

    grad_scale: divides the gradients, which is what clipping does; None: 1. As torch's fused AdamW understands it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.grad_scale: Tensor | None = None
        self._update: Callable[..., None] = _by_chunks
        self._compiled = False

    def compile(self) -> None:
        """From now on the update is one kernel of torch.compile's, the same up to how it rounds."""
        self._update, self._compiled = torch.compile(_update, dynamic=False), True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. Overwrites the gradients."""
        assert closure is None
        scale = None if self.grad_scale is None else self.grad_scale.reciprocal()
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            # A rate that changes must not be a constant of the compiled kernel.
            rate = torch.tensor(lr, dtype=torch.float64) if self._compiled else lr
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["exp_avg"] = torch.zeros_like(p)
                    self._update(p, p.grad, state["exp_avg"], scale, rate, group["weight_decay"], beta1, beta2)


def _by_chunks(p: Tensor, grad: Tensor, exp_avg: Tensor, scale: Tensor | None, *numbers: float) -> None:
    if p.device.type != "cpu" or not (p.is_contiguous() and grad.is_contiguous() and exp_avg.is_contiguous()):
        return _update(p, grad, exp_avg, scale, *numbers)
    vectors, count = (p.view(-1), grad.view(-1), exp_avg.view(-1)), p.numel()
    for start in range(0, count, _CHUNK):
        p, grad, exp_avg = (vector[start : start + _CHUNK] for vector in vectors)
        _update(p, grad, exp_avg, scale, *numbers)
    return None


def _update(
    p: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    scale: Tensor | None,
    lr: float | Tensor,
    weight_decay: float,
    beta1: float,
    beta2: float,
) -> None:
    if scale is not None:
        grad.mul_(scale)
    direction = (exp_avg * beta1).add_(grad, alpha=1 - beta1).sign_()
    p.mul_(1 - lr * weight_decay)
    p.sub_(direction.mul_(lr)) if isinstance(lr, Tensor) else p.add_(direction, alpha=-lr)
    exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2)
