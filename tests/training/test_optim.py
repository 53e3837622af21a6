"""Schedules as pure functions of the step, and parameter groups."""

from __future__ import annotations

import math
import re
from typing import Any, Literal, get_args

import lion_pytorch
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from crate_dist.config import ModelSection, OptimSection, RecipeError, load_recipe
from crate_dist.config.sections import ScheduleName
from crate_dist.models.build import build_model
from crate_dist.training.lion import Lion
from crate_dist.training.optim import Schedule, build_optimizer, learning_rate, listing, parameter_groups

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


@given(st.floats(0, 30), st.integers(1, 40), st.floats(0, 0.1), st.integers(0, 5))
def test_a_rate_is_never_below_where_it_begins_and_ends_nor_above_the_peak(
    warmup: float, epochs: int, lowest: float, cooldown: int
) -> None:
    schedule = Schedule(epochs + cooldown, 640, 64)
    for kind in get_args(ScheduleName):
        optim = OptimSection(
            lr=0.1,
            warmup_epochs=warmup,
            schedule=kind,
            warmup_lr=lowest / 2,
            min_lr=max(lowest, 1e-9),
            cooldown_epochs=cooldown,
        )
        rates = [learning_rate(step, optim, schedule) for step in range(schedule.total_steps)]
        assert all(lowest / 2 <= rate <= 0.1 for rate in rates)
        if warmup < epochs:
            assert rates[-10 * cooldown :] == [pytest.approx(optim.min_lr)] * 10 * cooldown or not cooldown


def test_the_rate_of_crate_alpha_is_big_vision_s() -> None:
    """Its recipe on ImageNet-21K, 91 epochs of batch 4096, 10 of warm-up, 8e-4 to 1e-6; see optim/build_optax.py."""
    schedule = Schedule(epochs=91, num_samples=12_743_321, global_batch=4096)
    optim = OptimSection(name="adamw", lr=8e-4, min_lr=1e-6, schedule="big_vision", warmup_epochs=10)
    total, warmup = round(91 * 12_743_321 / 4096), round(10 * 12_743_321 / 4096)
    assert learning_rate(0, optim, schedule) == 0
    for step in (1, 500, warmup - 1, warmup, warmup + 1, 100_000, 200_000, total - 1, total):
        cosine = 0.5 * (1 + math.cos(math.pi * min(max((step - warmup) / (total - warmup), 0), 1)))
        expected = 8e-4 * (1e-6 / 8e-4 + (1 - 1e-6 / 8e-4) * cosine) * min(1, step / warmup)
        assert learning_rate(step, optim, schedule) == pytest.approx(expected, rel=1e-9)


TIMM = {0: 1e-6, 1: 2.008e-4, 4: 8.002e-4, 5: 9.99618373e-4, 6: 9.99450488e-4, 200: 5.05e-4, 398: 1.00610669e-5}
"""Of timm 0.4.12: CosineLRScheduler(t_initial=400, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6, cycle_limit=1), at a
rate of 1e-3, by epoch."""


def test_the_rate_of_tost_is_timm_s_and_its_loop_is_an_epoch_late() -> None:
    """ToST's main.py calls scheduler.step(epoch) behind the epoch, with its own number and not the next one's."""
    schedule = Schedule(epochs=410, num_samples=1000, global_batch=100)
    values = {"lr": 1e-3, "min_lr": 1e-5, "warmup_lr": 1e-6, "warmup_epochs": 5, "cooldown_epochs": 10}
    timm, late = (OptimSection.model_validate({**values, "schedule": kind}) for kind in ("timm", "deit"))
    for epoch, rate in TIMM.items():
        assert len(rates := {learning_rate(10 * epoch + step, timm, schedule) for step in range(10)}) == 1
        assert rates.pop() == pytest.approx(rate, rel=1e-6)
        assert learning_rate(10 * epoch + 19, late, schedule) == pytest.approx(rate, rel=1e-6)
    assert learning_rate(0, late, schedule) == 1e-6
    for optim in (timm, late):
        assert {learning_rate(step, optim, schedule) for step in range(4000, 4100)} == {1e-5}
    assert learning_rate(3999, late, schedule) > 1e-5


@pytest.mark.parametrize(("schedule", "most"), [("timm", 7), ("deit", 6)])
def test_a_warm_up_that_leaves_no_epoch_behind_it_is_refused(schedule: str, most: int) -> None:
    values = [f"optim.schedule={schedule}", "train.epochs=10", "optim.min_lr=1e-6", "optim.cooldown_epochs=2"]
    with pytest.raises(RecipeError, match=f"leave none of train.epochs 10 .*={most} or less leaves one"):
        load_recipe("crate_base", [*values, f"optim.warmup_epochs={most + 0.5}"])
    recipe = load_recipe("crate_base", [*values, f"optim.warmup_epochs={most}"])
    length = Schedule(10, 100, 10)
    assert max(learning_rate(step, recipe.optim, length) for step in range(100)) > 0.3 * recipe.optim.lr
    load_recipe("crate_base", ["train.epochs=1", f"optim.schedule={schedule}", "optim.warmup_epochs=0"])
    load_recipe("crate_base", ["train.epochs=1", "optim.warmup_epochs=5"])


def test_old_recipes_keep_their_rates_bit_for_bit() -> None:
    """Of what was there before there were other schedules, a lowest rate and a cooldown."""
    before = {
        "cosine": [
            7.673004378039709e-08,
            0.00024,
            0.00023544804580266496,
            0.00011369365029670927,
            2.878845561937737e-13,
        ],
        "reference": [
            4.8e-05,
            0.00023957914310994053,
            0.00023247383873902698,
            0.00010995865880012214,
            2.6317983018540048e-08,
        ],
    }
    for kind, rates in before.items():
        optim = OptimSection.model_validate({"lr": 2.4e-4, "warmup_epochs": 5, "schedule": kind})
        assert [learning_rate(step, optim, IMAGENET) for step in (0, 3127, 11106, 50_000, 93_834)] == rates


def test_norms_biases_and_tokens_can_be_spared_weight_decay() -> None:
    model = build_model(ModelSection(arch="crate_demo", image_size=32, patch_size=8), 10, seed=0)
    everything = parameter_groups(model, OptimSection(lr=1, weight_decay=0.3))
    assert [group["weight_decay"] for group in everything] == [0.3]
    assert len(everything[0]["params"]) == len(list(model.parameters()))
    decayed, spared = parameter_groups(model, OptimSection(lr=1, weight_decay=0.3, decay="matrices"))
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    assert all(p.ndim == 2 for p in decayed["params"])
    assert {"cls_token", "pos_embedding", "head.linear.bias"} <= set(spared["names"])


class Oddities(nn.Module):
    """A parameter of each kind that a rule has to tell from the others."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token, self.pos_embedding = (nn.Parameter(torch.zeros(1, 1, 4)) for _ in range(2))
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.temp, self.dictionary = nn.Parameter(torch.zeros(4, 1)), nn.Parameter(torch.zeros(4, 16))


@pytest.mark.parametrize(
    ("rule", "decayed"),
    [
        ("matrices", {"linear.weight", "temp", "dictionary"}),
        ("weights", {"linear.weight", "temp", "dictionary", "stem.0.weight"}),  # timm's for ToST
        ("kernels", {"linear.weight", "stem.0.weight"}),  # flax's kernels for CRATE-α
    ],
)
def test_each_rule_decays_what_the_published_code_does(rule: str, decayed: set[str]) -> None:
    optim = OptimSection.model_validate({"lr": 1, "weight_decay": 0.1, "decay": rule})
    with_decay, without = parameter_groups(Oddities(), optim)
    assert set(with_decay["names"]) == decayed
    assert set(without["names"]) == {name for name, _ in Oddities().named_parameters()} - decayed


def test_layer_decay_lowers_the_rate_from_the_head_down_to_the_stem() -> None:
    model = build_model(ModelSection(arch="crate_demo", image_size=32, patch_size=8), 10, seed=0)
    depth = model.config.depth
    groups = parameter_groups(model, OptimSection(lr=1, weight_decay=0.05, decay="weights", layer_decay=0.5))
    factors = {name: group["lr_factor"] for group in groups for name in group["names"]}
    assert factors["head.linear.bias"] == factors["head.norm.weight"] == 1
    assert [factors[f"layers.{n}.ista.dictionary"] for n in range(depth)] == [0.5 ** (depth - n) for n in range(depth)]
    assert factors["cls_token"] == factors["pos_embedding"] == factors["patch_embed.proj.weight"] == 0.5 ** (depth + 1)
    assert len(factors) == len(list(model.parameters()))
    assert len(groups) == 2 * (depth + 2)


def test_the_list_has_a_line_for_each_kind_of_parameter() -> None:
    model = build_model(ModelSection(arch="crate_demo", image_size=32, patch_size=8), 10, seed=0)
    assert listing(parameter_groups(model, OptimSection(lr=1, weight_decay=0.3))) == [
        "all parameters: weight decay 0.3"
    ]
    optim = OptimSection(lr=1, weight_decay=0.05, decay="matrices", layer_decay=0.5)
    lines = [" ".join(line.split()) for line in listing(parameter_groups(model, optim))]
    last = model.config.depth - 1
    assert f"layers.0-{last}.ista.dictionary weight decay 0.05 learning rate x {0.5 ** (last + 1):.3g} to 0.5" in lines
    assert "cls_token weight decay 0 learning rate x " + f"{0.5 ** (last + 2):.3g}" in lines
    assert "head.linear.weight weight decay 0.05 learning rate x 1" in lines
    assert len(lines) == len({re.sub(r"\.\d+\.", ".", name) for name, _ in model.named_parameters()})


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


def test_adamw_is_what_crate_alpha_chains_of_optax() -> None:
    """scale_by_adam(0.9, 0.95), add_decayed_weights(0.1), then the rate, in fp64, its mean not kept in bf16."""
    optim = OptimSection(name="adamw", lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    weight = torch.nn.Parameter(vectors(0)[1])
    optimizer = build_optimizer([{"params": [weight], "weight_decay": 0.1}], optim)
    exact = weight.detach().double()
    mean, square = torch.zeros_like(exact), torch.zeros_like(exact)
    for count in range(1, 6):
        gradient = vectors(count)[1]
        mean, square = 0.9 * mean + 0.1 * gradient.double(), 0.95 * square + 0.05 * gradient.double() ** 2
        update = mean / (1 - 0.9**count) / ((square / (1 - 0.95**count)).sqrt() + 1e-8) + 0.1 * exact
        optimizer.param_groups[0]["lr"] = rate = optim.lr / count
        exact = exact - rate * update
        weight.grad = gradient
        optimizer.step()
    assert torch.allclose(weight.double(), exact, rtol=1e-6, atol=1e-8)


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
