"""First weights: what the published training codes draw, where it is not what torch draws of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


def leave(model: nn.Module) -> None:
    """Leaves everything as the parts drew it."""


def draw_alpha(model: nn.Module) -> None:
    """Draws as CRATE-α's training code, which is JAX; its PyTorch file, which evaluates alone, would draw other ones.

    Linear maps are normal and without bias, that of the patches uniform of variance 2 / fan-in; ODL draws its own.
    """
    _draw(model, nn.init.normal_)
    for layer in _linear_maps(model, "patch_embed"):
        nn.init.kaiming_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)


def draw_vit(model: nn.Module) -> None:
    """Draws as timm does for its ViT, where the map of the patches stays as torch draws a convolution."""
    _draw(model, nn.init.trunc_normal_)


def _draw(model: nn.Module, normal: Callable[..., Tensor]) -> None:
    """Draws linear maps of layers and head, and positions, of standard deviation 0.02; a class token of almost zero."""
    for layer in (*_linear_maps(model, "layers"), *_linear_maps(model, "head")):
        normal(layer.weight, std=_STD)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    for name, parameter in model.named_parameters():
        if name == "pos_embedding":
            normal(parameter, std=_STD)
        elif name.endswith("cls_token"):
            nn.init.normal_(parameter, std=1e-6)


def _linear_maps(model: nn.Module, part: str) -> Iterator[nn.Linear]:
    return (module for module in model.get_submodule(part).modules() if isinstance(module, nn.Linear))
