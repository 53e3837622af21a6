"""First weights: what the published training codes draw, where it is not what the parts draw of themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

_STD = 0.02


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
    for linear in _linear_maps(model, "patch_embed"):
        nn.init.kaiming_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)


def draw_vit(model: nn.Module) -> None:
    """Draws as timm does for its ViT, where the map of the patches stays as torch draws a convolution."""
    _draw(model, nn.init.trunc_normal_)


def draw_tost(model: nn.Module) -> None:
    """Draws as ToST's code: as ViT, but the class token too; convolutions and the map of positions stay as torch's."""
    _draw(model, nn.init.trunc_normal_)
    for name, parameter in model.named_parameters():
        if name.endswith("cls_token"):
            nn.init.trunc_normal_(parameter, std=_STD)


def _draw(model: nn.Module, normal: Callable[..., Tensor]) -> None:
    """Draws linear maps of layers and head, and positions, of standard deviation 0.02; a class token of almost zero."""
    for linear in (*_linear_maps(model, "layers"), *_linear_maps(model, "head")):
        normal(linear.weight, std=_STD)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    for name, parameter in model.named_parameters():
        if name == "pos_embedding":
            normal(parameter, std=_STD)
        elif name.endswith("cls_token"):
            nn.init.normal_(parameter, std=1e-6)


def _linear_maps(model: nn.Module, part: str) -> Iterator[nn.Linear]:
    return (module for module in model.get_submodule(part).modules() if isinstance(module, nn.Linear))
