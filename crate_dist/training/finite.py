"""Where numbers stopped being finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def where_not_finite(model: nn.Module, loss_of: Callable[[], Tensor]) -> str | None:
    """The first layer whose output is not finite, going forward; else the last one whose gradient is not; else None.

    loss_of: computes the loss with `model`, eager, so that every layer is called
    """
    first: list[str] = []

    def look(name: str, output: Any) -> None:
        if not first and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
            first.append(name)

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
        for name, module in model.named_modules()
        if name and not any(module.children())
    ]
    loss = loss_of()
    for hook in hooks:
        hook.remove()
    if first:
        return f"the output of {first[0]}"
    if not bool(torch.isfinite(loss)):
        return "the loss, though all layers' outputs are finite"
    named = list(model.named_parameters())
    gradients = torch.autograd.grad(loss, [p for _, p in named])
    for (name, _), gradient in zip(reversed(named), reversed(gradients), strict=True):
        if not bool(torch.isfinite(gradient).all()):
            return f"the gradient of {name}"
    return None
