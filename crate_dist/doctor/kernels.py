"""The parts of a layer by themselves: attention by each backend, ISTA written in each way; forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import linear, relu, scaled_dot_product_attention

from crate_dist.config.archs import ARCHS
from crate_dist.doctor.ceilings import TOKENS
from crate_dist.doctor.contestants import prepare
from crate_dist.doctor.correct import BACKENDS
from crate_dist.doctor.stage import Finding, Setting
from crate_dist.doctor.timing import in_turns, median_s
from crate_dist.models.config import ModelConfig
from crate_dist.models.tokenwise.ista import ISTA

SIZES: list[tuple[str, int]] = [("crate_base", 256), ("crate_large", 128)]
SMALL_SIZES: list[tuple[str, int]] = [("crate_demo", 2)]


def examine(setting: Setting) -> Iterator[Finding]:
    """Yields a finding per backend and way, in milliseconds; which is the fastest is for the model to choose."""
    prepare(setting)
    device = torch.device(setting.device)
    sizes = SMALL_SIZES if setting.small else SIZES
    for arch, images in sizes:
        dims = ARCHS[arch]
        shape = (images, dims.heads, TOKENS, dims.dim // dims.heads)
        yield from timed(f"{arch} at {images}, attention", attention(shape, device), device, setting.small)
    for compiled in (False,) if setting.small else (False, True):  # compiling takes longer than all before
        for arch, images in sizes:
            ways = ista(images * TOKENS, ARCHS[arch].dim, device, compiled)
            yield from timed(f"{arch} at {images}, ISTA", ways, device, setting.small)


def timed(name: str, ways: dict[str, Callable[[], object]], device: torch.device, small: bool) -> Iterator[Finding]:
    """Measures in turns the ways that work here."""
    working = {}
    for way, work in ways.items():
        try:
            work()
            working[way] = work
        except RuntimeError as error:
            yield Finding(f"{name}, {way}", "not available", note=str(error).strip().splitlines()[0][:200])
    taken = in_turns(working, device, rounds=3 if small else 5, calls=1 if small else 5)
    for way, each in taken.items():
        yield Finding(f"{name}, {way}, forward and backward", 1000 * median_s(each), "ms")


def attention(shape: tuple[int, ...], device: torch.device) -> dict[str, Callable[[], object]]:
    """Returns attention with Q = K = V, as training has it and by each backend; shape: (b, h, n, p)."""
    w = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn_like(w)

    def by(name: str) -> None:
        with sdpa_kernel(BACKENDS[name]):
            back(scaled_dot_product_attention(w, w, w), weight, [w])

    ways: dict[str, Callable[[], object]] = {name: lambda name=name: by(name) for name in BACKENDS}  # type: ignore[misc]
    return {"as training has it": lambda: back(scaled_dot_product_attention(w, w, w), weight, [w]), **ways}


def of_width(dim: int) -> ModelConfig:
    """Returns a model of one layer, whose parts may be built alone."""
    return ModelConfig(dim=dim, depth=1, heads=1, image_size=16, patch_size=16, num_classes=1)


def ista(tokens: int, dim: int, device: torch.device, compiled: bool) -> dict[str, Callable[[], object]]:
    """Returns ISTA as published, in two products and in one of (tokens, dim); compiled, the latter two."""
    z = torch.randn(1, tokens, dim, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn_like(z)
    forms = {name: ISTA(of_width(dim)).to(device, torch.bfloat16) for name in ("two products", "one product")}
    forms["one product"].one_product = True

    def run(form: Callable[[Tensor], Tensor], dictionary: nn.Parameter) -> Callable[[], object]:
        return lambda: back(form(z), weight, [z, dictionary])

    first = forms["two products"]
    if compiled:
        fused = {name: torch.compile(form, dynamic=False) for name, form in forms.items()}
        return {f"{name}, compiled": run(fused[name], form.dictionary) for name, form in forms.items()}
    ways = {"three products, as published": run(lambda z: _published(z, first), first.dictionary)}
    return ways | {name: run(form, form.dictionary) for name, form in forms.items()}


def _published(z: Tensor, form: ISTA) -> Tensor:
    d = form.dictionary
    gradient = linear(z, d.t()) - linear(linear(z, d), d.t())
    return relu(z + form.step * gradient - form.step * form.threshold)


def back(output: Tensor, weight: Tensor, inputs: list[Tensor]) -> None:
    """Computes the gradients of the inputs."""
    torch.autograd.grad(output, inputs, weight)
