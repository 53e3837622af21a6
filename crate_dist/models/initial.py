"""First weights that torch's own modules do not have."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

_STD = 0.02
_Layer = TypeVar("_Layer", bound=nn.Linear)


def narrow(layer: _Layer) -> _Layer:
    """Draws a linear map's weights from a normal distribution of standard deviation 0.02, biases 0; returns the map."""
    draw_narrow(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def draw_narrow(parameter: Tensor) -> None:
    """Draws from a normal distribution of standard deviation 0.02, cut off at ±2 as the published codes have it.

    Draws nothing on the device "meta", where torch imports sympy for it, half a second.
    """
    if not parameter.is_meta:
        nn.init.trunc_normal_(parameter, std=_STD)


def drawn(*shape: int) -> Tensor:
    """Draws what torch.randn would; nothing on the device "meta", where torch imports sympy for it, half a second."""
    empty = torch.empty(shape)
    return empty if empty.is_meta else empty.normal_()
