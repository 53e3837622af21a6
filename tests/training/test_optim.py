"""Schedules as pure functions of the step, and parameter groups."""

from __future__ import annotations

import math
from typing import Any, Literal

import lion_pytorch
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crate_dist.config import ModelSection, OptimSection
from crate_dist.models.build import build_model
from crate_dist.training.lion import Lion
from crate_dist.training.optim import Schedule, build_optimizer, learning_rate, parameter_groups

IMAGENET = Schedule(epochs=150, num_samples=1_281_167, global_batch=2048)


def test_the_paper_s_schedule_on_imagenet() -> None:
    optim = OptimSection(lr=2.4e-4, warmup_epochs=5)
    assert IMAGENET.total_steps == math.ceil(150 * 1_281_167 / 2048)
    assert learning_rate(0, optim, IMAGENET) == pytest.approx(2.4e-4 / (5 * IMAGENET.steps_per_epoch))
    warmed = math.ceil(5 * IMAGENET.steps_per_epoch)
    assert learning_rate(warmed, optim, IMAGENET) == pytest.approx(2.4e-4, rel=1e-3)
    middle = (warmed + IMAGENET.total_steps) // 2
    assert learning_rate(middle, optim, IMAGENET) == pytest.approx(1.2e-4, rel=1e-3)
    assert 0 <= learning_rate(IMAGENET.total_steps - 1, optim, IMAGENET) < 1e-12


def test_the_published_code_s_schedule_changes_once_per_epoch() -> None:
    """Its LambdaLR: min((epoch + 1) / (20 + 1e-8), (cos(epoch / epochs * pi) + 1) / 2)."""
    schedule = Schedule(epochs=200, num_samples=1000, global_batch=100)
    optim = OptimSection(lr=2e-4, schedule="reference", warmup_epochs=20)
    for epoch in (0, 5, 19, 20, 100, 199):
        expected = 2e-4 * min((epoch + 1) / (20 + 1e-8), 0.5 * (math.cos(epoch / 200 * math.pi) + 1))
        rates = {learning_rate(step, optim, schedule) for step in range(10 * epoch, 10 * epoch + 10)}
        assert len(rates) == 1
        assert rates.pop() == pytest.approx(expected)


@given(st.integers(1, 50), st.integers(1, 5000), st.integers(1, 400))
def test_epochs_end_when_every_sample_was_visited(epochs: int, samples: int, batch: int) -> None:
    schedule = Schedule(epochs, samples, batch)
    end = schedule.epoch_end(epochs)
    assert end * batch >= epochs * samples > (end - 1) * batch
    assert schedule.epochs_completed(end) >= epochs > schedule.epochs_completed(end - 1)


@given(st.floats(0, 30), st.integers(1, 40))
def test_a_rate_is_never_negative_and_never_above_the_peak(warmup: float, epochs: int) -> None:
    schedule = Schedule(epochs, 640, 64)
    for kind in ("cosine", "reference"):
        optim = OptimSection(lr=0.1, warmup_epochs=warmup, schedule=kind)
        rates = [learning_rate(step, optim, schedule) for step in range(schedule.total_steps)]
        assert all(0 <= rate <= 0.1 for rate in rates)


def test_norms_biases_and_tokens_can_be_spared_weight_decay() -> None:
    model = build_model(ModelSection(arch="crate_demo", image_size=32, patch_size=8), 10, seed=0)
    everything = parameter_groups(model, OptimSection(lr=1, weight_decay=0.3))
    assert [group["weight_decay"] for group in everything] == [0.3]
    assert len(everything[0]["params"]) == len(list(model.parameters()))  # type: ignore[arg-type]
    decayed, spared = parameter_groups(model, OptimSection(lr=1, weight_decay=0.3, decay_all=False))
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    assert all(p.ndim == 2 for p in decayed["params"])  # type: ignore[attr-defined]
    assert {"cls_token", "pos_embedding", "head.linear.bias"} <= set(spared["names"])  # type: ignore[call-overload]


@pytest.mark.parametrize("name", ["lion", "adamw"])
def test_weight_decay_shrinks_a_parameter_without_gradient(name: str) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optim = OptimSection(name=name, lr=0.1, weight_decay=0.5)
    optimizer = build_optimizer([{"params": [weight], "weight_decay": 0.5}], optim)
    weight.grad = torch.zeros(3)
    optimizer.step()
    assert torch.allclose(weight, torch.full((3,), 1 - 0.1 * 0.5))


def vectors(seed: int) -> list[torch.Tensor]:
    """Longer than what the fused update takes at a time, and short."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in (300_001, 7)]


@pytest.mark.parametrize("arguments", [{}, {"lr": 1e-3, "weight_decay": 0.3, "decoupled_weight_decay": True}], ids=str)
def test_lion_in_one_pass_is_lion_pytorch_bit_for_bit(arguments: dict[str, Any]) -> None:
    ours, theirs = ([torch.nn.Parameter(v.clone()) for v in vectors(0)] for _ in range(2))
    fused, plain = Lion(ours, **arguments), lion_pytorch.Lion(theirs, **arguments)
    for step in range(5):
        for optimizer, parameters in ((fused, ours), (plain, theirs)):
            optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)
            for p, gradient in zip(parameters, vectors(step + 1), strict=True):
                p.grad = gradient
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(fused.state[p]["exp_avg"], plain.state[q]["exp_avg"])
    plain.load_state_dict(fused.state_dict())  # the same groups and names: either goes on from the other's state
    fused.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("name", ["lion", "adamw"])
def test_a_scale_divides_the_gradients_as_clipping_does(name: Literal["lion", "adamw"]) -> None:
    optim = OptimSection(name=name, lr=1e-3, weight_decay=0.1)
    states = []
    for scale in (None, torch.tensor(4.0)):
        weight = torch.nn.Parameter(vectors(0)[0])
        optimizer: Any = build_optimizer([{"params": [weight], "weight_decay": 0.1}], optim)
        optimizer.grad_scale = scale
        weight.grad = vectors(1)[0] / (1 if scale is not None else 4)
        optimizer.step()
        states.append((weight.detach(), optimizer.state[weight]["exp_avg"]))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("name", ["lion", "adamw"])
def test_a_step_that_found_what_is_not_finite_changes_nothing_and_one_that_did_not_everything(
    name: Literal["lion", "adamw"],
) -> None:
    weight, plain = (torch.nn.Parameter(vectors(0)[0]) for _ in range(2))
    optim = OptimSection(name=name, lr=1e-3, weight_decay=0.1)
    guarded, free = (build_optimizer([{"params": [p], "weight_decay": 0.1}], optim) for p in (weight, plain))
    for bad in (0.0, 1.0, 0.0):
        before = [weight.detach().clone(), *(value.clone() for value in guarded.state[weight].values())]
        guarded.found_inf = torch.tensor(bad)  # type: ignore[attr-defined]
        weight.grad = vectors(1)[0] + (float("nan") if bad else 0.0)
        guarded.step()
        if bad:
            assert all(map(torch.equal, before, [weight.detach(), *guarded.state[weight].values()]))
        else:
            plain.grad = vectors(1)[0]
            free.step()
            assert torch.equal(weight, plain)
            assert all(map(torch.equal, guarded.state[weight].values(), free.state[plain].values()))
