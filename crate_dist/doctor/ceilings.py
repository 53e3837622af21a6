"""What the device can do at best: copies, and matrix products, a large one and the model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from crate_dist.config.archs import ARCHS
from crate_dist.doctor.contestants import alone
from crate_dist.doctor.stage import Finding, Setting
from crate_dist.doctor.timing import in_turns, median_s
from crate_dist.models.matmul import linear
from crate_dist.training.utilisation import published_flop_s

KNOWN = {"H200": 4.8e12, "H100 80GB HBM3": 3.35e12}
"""Part of a GPU's name -> bytes/s of its memory, as NVIDIA states them."""
REACHED = 0.5
"""Share of these that a sound card reaches at the least: copies come to some 0.9, products on random numbers to 0.7."""
TOKENS = 197


def examine(setting: Setting) -> Iterator[Finding]:
    """Yields a finding per copy and product; one that stays below half of what a known GPU is built for has failed."""
    with alone(setting) as device:
        name = torch.cuda.get_device_name() if device.type == "cuda" else ""
        bytes_s = next((rate for known, rate in KNOWN.items() if known in name), None)
        flop_s = published_flop_s(name) if bytes_s else None
        yield _rated("copy, bytes read and written", copy_bytes_s(device, setting.small), 1e9, "GB/s", bytes_s)
        if device.type == "cuda":
            yield _rated("copy within the second-level cache", copy_bytes_s(device, small=True), 1e9, "GB/s", None)
        side = 1024 if setting.small else 8192
        yield _rated(f"product {side}³, bf16", product_flop_s(device, side, side, side), 1e12, "TFLOP/s", flop_s)
        for arch in ("crate_base", "crate_large"):
            for images in (1,) if setting.small else (64, 128, 256):
                dim = ARCHS[arch].dim
                rate = product_flop_s(device, images * TOKENS, dim, dim)
                yield _rated(f"product {images * TOKENS} x {dim} x {dim}, bf16", rate, 1e12, "TFLOP/s", None)


def copy_bytes_s(device: torch.device, small: bool = False) -> float:
    """Measures a copy within the device's memory: bytes read and written per second."""
    source = torch.randint(0, 256, ((1 << 24) if small else (1 << 30),), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _median_s(device, lambda: target.copy_(source))


def product_flop_s(
    device: torch.device, rows: int, inner: int, columns: int, dtype: torch.dtype = torch.bfloat16
) -> float:
    """Measures a product of random matrices (rows, inner) and (columns, inner)ᵀ, 2 operations per multiply-add."""
    a, b = (torch.randn(count, inner, device=device, dtype=dtype) for count in (rows, columns))
    return 2 * rows * inner * columns / _median_s(device, lambda: linear(a, b))


def _median_s(device: torch.device, work: Callable[[], object]) -> float:
    calls = 20 if device.type == "cuda" else 1
    return median_s(in_turns({"": work}, device, rounds=5, calls=calls)[""])


def _rated(what: str, rate: float, per: float, unit: str, built_for: float | None) -> Finding:
    """Returns the finding of a rate, held against half of what the GPU is built for, where that is known."""
    if built_for is None:
        return Finding(what, rate / per, unit)
    passed = rate >= REACHED * built_for
    note = (
        "" if passed else "is another program on this GPU, or its clock held down? nvidia-smi -q -d PERFORMANCE tells"
    )
    return Finding(what, rate / per, unit, f"at least {REACHED * built_for / per:,.0f}", passed, note)
