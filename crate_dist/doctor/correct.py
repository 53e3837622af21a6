"""Whether this device computes what it should: every precision, compiled and not, against fp64 on the CPU.

`exact` says how far from it a computation may be, and why.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from crate_dist.doctor import correct_step
from crate_dist.doctor.contestants import alone, is_compiled, is_warm, of_case
from crate_dist.doctor.exact import FACTOR, PLAIN, ROUNDED_FACTOR, Case, compared, errors, new_case, of_engine, plainly
from crate_dist.doctor.stage import Finding, Setting

COMPILE_S, COMPILE_SMALL_S = 40.0, 150.0
"""Seconds that must be left to begin a compile, on a GPU, and on a CPU by a C++ compiler."""
WARM_S = 20.0
"""Those where the stage compile has compiled it."""
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def examine(setting: Setting) -> Iterator[Finding]:
    """Yields a finding per way to compute."""
    seed = int.from_bytes(os.urandom(4))
    with alone(setting) as device:
        case = new_case(setting.small, seed)
        yield Finding("random numbers", f"seed {seed}", note="weights, images and labels of this stage follow from it")
        yield from passes(case, setting, device)
        yield from attention(setting, device, seed)
        yield from correct_step.steps(case, setting, device, seed)


def passes(case: Case, setting: Setting, device: torch.device) -> Iterator[Finding]:
    """Compares logits and every gradient in each precision, eager and compiled, with and without recomputation."""
    depth = case.model.config.depth
    plain: dict[str, dict[str, float]] = {}
    for compiled, precision, recompute in itertools.product((True, False), PLAIN, (0, depth)):
        name = ", ".join([precision, "compiled" if compiled else "eager", *(["recomputed"] if recompute else [])])
        name = f"logits and gradients, {name}"
        needs_s = WARM_S if is_warm(setting, of_case(precision)) else COMPILE_SMALL_S if setting.small else COMPILE_S
        if compiled and (setting.left_s < needs_s or (device.type == "cpu" and not shutil.which("g++"))):
            yield Finding(name, "left out", note="no g++ here" if setting.left_s > needs_s else "no time left")
            continue
        if compiled and setting.small and (precision, recompute) != ("fp32", depth):
            continue  # a minute each on a CPU
        if precision not in plain:
            plain[precision] = errors(plainly(case, precision, device), case.exact)
            worst = max(plain[precision].values(), key=lambda error: float("inf") if error != error else error)
            limit = PLAIN[precision]
            yield Finding(f"plain form, {precision}", worst, "", f"at most {limit:g}", worst <= limit)
        if compiled and not recompute:
            torch.compiler.reset()  # torch makes eight graphs of a function, and no more
        engine = case.engine(device, precision=precision, compile=compiled, recompute=recompute)
        if compiled and not is_compiled(engine.module):
            yield Finding(name, "not compiled", passed=False, note="torch.compile does not work here; the log says why")
            continue
        factor = FACTOR if precision == "fp32" else ROUNDED_FACTOR
        yield compared(name, errors(of_engine(engine, case.batch), case.exact), plain[precision], case.jump, factor)


def attention(setting: Setting, device: torch.device, seed: int) -> Iterator[Finding]:
    """Compares each backend of attention with Q = K = V in bf16, at the tokens of 224 and 384 pixels."""
    shape = (2, 4, 64) if setting.small else (4, 12, 64)
    generator = torch.Generator().manual_seed(seed)
    for tokens in (197, 577):
        images, heads, features = shape
        w, weight = (torch.randn(images, heads, tokens, features, generator=generator).bfloat16() for _ in range(2))
        exact = attended(_written_out, w.double(), weight.double())
        plain = errors(attended(_written_out, w.to(device), weight.to(device)), exact)
        for name, backend in BACKENDS.items():
            what = f"attention, {name}, {tokens} tokens, bf16"
            try:
                with sdpa_kernel(backend):
                    found = attended(_fused, w.to(device), weight.to(device))
            except RuntimeError as error:
                absent = any(said in str(error) for said in ("No available kernel", "No viable backend"))
                said = str(error).strip().splitlines()[0][:200]
                yield Finding(
                    what, "not available" if absent else "failed", passed=None if absent else False, note=said
                )
                continue
            yield compared(what, errors(found, exact), plain)


def attended(attend: Callable[[Tensor], Tensor], w: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Returns attention's output for Q = K = V = w, and the gradient of its sum weighted, in fp64 on the CPU."""
    w = w.detach().requires_grad_()
    output = attend(w)
    [gradient] = torch.autograd.grad((output * weight).sum(), [w])
    return {"output": output.detach().double().cpu(), "gradient": gradient.double().cpu()}


def _fused(w: Tensor) -> Tensor:
    return scaled_dot_product_attention(w, w, w)


def _written_out(w: Tensor) -> Tensor:
    return (w @ w.mT * w.shape[-1] ** -0.5).softmax(dim=-1) @ w
