"""Matrix products, by the library that is fastest on the machine at hand.

On a GPU that is torch's own choice. On a CPU torch asks MKL for fp32 products, which knows Intel's processors: on
others with AVX-512 it uses half the width of their registers, and oneDNN, which torch carries as well, does not. On
an AMD EPYC of 2024 one core computes 94 GFLOP/s with MKL and 210 with oneDNN; benchmarks/README.md has more.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _mkl_is_slow() -> bool:
    """Returns whether this CPU has AVX-512 and is not one that MKL uses it on."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


ONEDNN = _mkl_is_slow()
"""True where fp32 products on the CPU go to oneDNN."""

_WORTH_IT = 1 << 24
"""Multiply-adds from which a product gains more than the way to oneDNN costs, some 50 µs."""


class Linear(nn.Linear):
    """torch's Linear, through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (…, d_in) to (…, d_out)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x weightᵀ + bias, as torch.nn.functional.linear: (…, d_in) with weights (d_out, d_in) -> (…, d_out)."""
    if _goes_to_onednn(x, len(weight)):
        product: Tensor = _product(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], len(weight))
        return product if bias is None else product.add_(bias)
    return F.linear(x, weight, bias)


def addmm(c: Tensor, a: Tensor, b: Tensor, *, alpha: float) -> Tensor:
    """Returns c + α a b, as torch.addmm, rounded once: (n, d_in) and (d_in, d_out) with c (n, d_out) -> (n, d_out)."""
    if _goes_to_onednn(a, b.shape[1]):
        product: Tensor = _product(a, b.t())
        return torch.add(c, product, alpha=alpha)
    return torch.addmm(c, a, b, alpha=alpha)


def _goes_to_onednn(x: Tensor, d_out: int) -> bool:
    large = x.numel() * d_out >= _WORTH_IT
    return ONEDNN and large and x.is_cpu and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


@torch.library.custom_op("crate_dist::product", mutates_args=())
def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Returns x weightᵀ by oneDNN, (n, d_in) and (d_out, d_in) -> (n, d_out), fp32. Opaque to torch.compile."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product


@_product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight))


def _remember(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
    wanted_x, wanted_weight = ctx.needs_input_grad  # type: ignore[attr-defined]
    return (
        _product(gradient, weight.t()) if wanted_x else None,
        _product(gradient.t(), x.t()) if wanted_weight else None,
    )


_product.register_autograd(_backward, setup_context=_remember)
