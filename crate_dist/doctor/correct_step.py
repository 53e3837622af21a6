"""Whether a step does to the weights what it should: clipping, the optimizers, an inf, and what is saved and loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from crate_dist.checkpoint import saving
from crate_dist.checkpoint.format import WEIGHTS, Progress
from crate_dist.checkpoint.loading import RankState, find_newest
from crate_dist.config import OptimSection
from crate_dist.doctor.contestants import is_warm, of_case
from crate_dist.doctor.exact import FACTOR, Case, errors, plainly
from crate_dist.doctor.stage import Finding, Setting
from crate_dist.training.compiling import eagerly
from crate_dist.training.engine import Engine, NotFinite
from crate_dist.training.finite import where_not_finite
from crate_dist.training.lion import Lion
from crate_dist.training.optim import STATE_KEYS, build_optimizer
from crate_dist.world import detect_world

OPTIMIZERS = {
    "lion": OptimSection(name="lion", lr=1e-3, weight_decay=0.5, betas=(0.9, 0.99)),
    "adamw": OptimSection(name="adamw", lr=1e-3, weight_decay=0.5, betas=(0.9, 0.999)),
}
UPDATE = 1e-3
"""Largest relative error of an optimizer's update: fp32 rounds a weight of 0.02 to 1e-9, and an update is of 1e-3; of a
million signs of Lion's a few may differ."""

CLIPPED = 1e-5
"""Smallest bound of a clipped gradient's error: fp32 sums a norm of millions of squares to about 1e-6."""


def steps(case: Case, setting: Setting, device: torch.device, seed: int) -> Iterator[Finding]:
    """Yields the findings on all parts of a step."""
    yield from clipping(case, device)
    yield from optimizers(setting.small, device, seed)
    yield from planted_inf(case, device, compiled=False)
    if is_warm(setting, of_case("bf16")):
        yield from planted_inf(case, device, compiled=True)
    yield from saved_and_loaded(case, setting, device)


def clipping(case: Case, device: torch.device) -> Iterator[Finding]:
    """Takes a step whose gradient is clipped to half its norm; the momentum then holds what came of the gradient."""
    gradients = {name: value for name, value in case.exact.items() if name != "logits"}
    norm = math.sqrt(sum(float(value.square().sum()) for value in gradients.values()))
    plain = FACTOR * max(errors(plainly(case, "fp32", device), case.exact).values())
    bound = max(plain, case.jump("head.linear.weight"), CLIPPED)
    for name, optim in OPTIMIZERS.items():
        clip = norm / 2
        changed = {"optim": optim.model_copy(update={"grad_clip": clip})}
        engine = case.engine(device, changed, precision="fp32")
        reported = float(engine.step(iter([case.batch]), optim.lr, 0).grad_norm)
        assert optim.betas is not None
        kept = optim.betas[1] if name == "lion" else optim.betas[0]
        expected = {
            g: (1 - kept) / ((norm + 1e-6) / clip) * torch.cat([gradients[n].flatten() for n in group.names])
            for g, group in enumerate(engine.layouts)
        }
        momentum = {g: part.double().cpu()[: len(expected[g])] for g, part in enumerate(engine.state()["exp_avg"])}
        error = max(
            abs(reported / norm - 1), *(float((momentum[g] - e).norm() / e.norm()) for g, e in expected.items())
        )
        what = f"clipping in a step of {name}: norm and momentum, fp32"
        yield Finding(what, error, "", f"at most {bound:.2g}", error <= bound)


def optimizers(small: bool, device: torch.device, seed: int) -> Iterator[Finding]:
    """Compares three updates of a flat vector, at changing rates and clipped, with the optimizers' formulas in fp64."""
    generator = torch.Generator().manual_seed(seed)
    weights, *gradients = torch.randn(4, 1 << (16 if small else 22), generator=generator)
    weights, clip = 0.02 * weights, torch.tensor(2.0)
    for name, optim in OPTIMIZERS.items():
        parameter = nn.Parameter(weights.to(device, copy=True))
        optimizer = build_optimizer([{"params": [parameter], "weight_decay": optim.weight_decay}], optim)
        if compiled := isinstance(optimizer, Lion) and device.type == "cuda":
            optimizer.compile()
        exact, state = weights.double(), {kind: torch.zeros(len(weights)).double() for kind in STATE_KEYS[name]}
        for number, gradient in enumerate(gradients, start=1):
            lr = optim.lr / number
            optimizer.param_groups[0]["lr"] = lr
            optimizer.grad_scale = clip.to(device)  # type: ignore[attr-defined]
            parameter.grad = gradient.to(device, copy=True)
            optimizer.step()
            exact = _UPDATES[name](exact, gradient.double() / 2, state, lr, optim, number)
        found = {"update": parameter.detach().double().cpu() - weights}
        found |= {kind: optimizer.state[parameter][kind].double().cpu() for kind in state}
        error = max(errors(found, {"update": exact - weights, **state}).values())
        kind = "compiled" if compiled else "fused" if name == "adamw" else "eager"
        yield Finding(f"{name}, {kind}: update and moments", error, "", f"at most {UPDATE:g}", error <= UPDATE)
        before = [parameter.detach().clone(), *(optimizer.state[parameter][kind].clone() for kind in state)]
        optimizer.found_inf = torch.ones((), device=device)  # type: ignore[attr-defined]
        parameter.grad = torch.full_like(parameter, math.inf)
        optimizer.step()
        after = [parameter.detach(), *(optimizer.state[parameter][kind] for kind in state)]
        untouched = all(map(torch.equal, before, after))
        said = "nothing changed" if untouched else "CHANGED"
        yield Finding(f"{name}, {kind}: a step of inf, told so", said, "", "nothing changed", untouched)


def _lion(p: Tensor, g: Tensor, state: dict[str, Tensor], lr: float, optim: OptimSection, step: int) -> Tensor:
    """Chen et al. 2023, arXiv 2302.06675, algorithm 2."""
    beta1, beta2 = optim.betas or (0.9, 0.99)
    direction = (beta1 * state["exp_avg"] + (1 - beta1) * g).sign()
    state["exp_avg"] = beta2 * state["exp_avg"] + (1 - beta2) * g
    return p - lr * (direction + optim.weight_decay * p)


def _adamw(p: Tensor, g: Tensor, state: dict[str, Tensor], lr: float, optim: OptimSection, step: int) -> Tensor:
    """Loshchilov, Hutter 2019, arXiv 1711.05101, algorithm 2."""
    beta1, beta2 = optim.betas or (0.9, 0.999)
    state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
    state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g * g
    mean, square = state["exp_avg"] / (1 - beta1**step), state["exp_avg_sq"] / (1 - beta2**step)
    return p - lr * (mean / (square.sqrt() + optim.eps) + optim.weight_decay * p)


_UPDATES = {"lion": _lion, "adamw": _adamw}


def planted_inf(case: Case, device: torch.device, compiled: bool) -> Iterator[Finding]:
    """Trains with an inf in one weight that the model computes with: no step may be taken, the layer must be named."""
    for name, optim in OPTIMIZERS.items():
        engine = case.engine(device, {"optim": optim}, precision="bf16", compile=compiled)
        engine.module.get_parameter("layers.1.mssa.out.bias").data[0] = math.inf  # the master weights stay finite
        state, stopped = engine.state(), ""
        before = on_cpu(state)
        try:
            for step in range(3):
                engine.step(iter([case.batch]), optim.lr, step)
            engine.check()
        except NotFinite as error:
            stopped = str(error)
        untouched = same(before, on_cpu(state))
        with eagerly():
            place = where_not_finite(engine.module, partial(engine.loss, case.batch)) or "nothing"
        said = f"{stopped or 'no error'}; weights {'untouched' if untouched else 'CHANGED'}; found in {place}"
        passed = bool(stopped) and untouched and "layers.1.mssa.out" in place
        what = f"an inf in a weight, {name}{', compiled' * compiled}"
        yield Finding(what, said, "", "stopped, weights untouched, the layer named", passed)


def saved_and_loaded(case: Case, setting: Setting, device: torch.device) -> Iterator[Finding]:
    """Takes steps, saves, loads into a fresh engine, and compares all bits."""
    world = detect_world()
    for name, optim in OPTIMIZERS.items():
        first, second = (case.engine(device, {"optim": optim}, precision="bf16") for _ in range(2))
        for step in range(2):
            first.step(iter([case.batch]), optim.lr, step)
        folder = setting.scratch / f"saved-{name}"
        state = on_cpu(first.state())
        saving.publish(folder, state, first.layouts, Progress(step=2), world)
        found = find_newest(folder, world)
        assert found is not None
        second.partitions.load(found)
        equal = same(state, on_cpu(second.state())) and all(map(torch.equal, weights_of(first), weights_of(second)))
        moved = not same({WEIGHTS: state[WEIGHTS]}, {WEIGHTS: on_cpu(case.engine(device).state())[WEIGHTS]})
        said = "equal" if equal and moved else "the steps changed nothing" if equal else "DIFFERENT"
        yield Finding(f"saved and loaded, {name}", said, "", "equal in every bit", said == "equal")


def weights_of(engine: Engine) -> list[Tensor]:
    """Returns the weights that the model computes with."""
    return [weight.detach() for weight in engine.module.parameters()]


def on_cpu(state: RankState) -> RankState:
    """Returns a copy of an engine's state."""
    return {kind: [part.to("cpu", copy=True) for part in parts] for kind, parts in state.items()}


def same(one: RankState, other: RankState) -> bool:
    """Tells whether two states are equal in every bit."""
    return all(torch.equal(a, b) for kind in one for a, b in zip(one[kind], other[kind], strict=True))
