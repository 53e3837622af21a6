"""What a part costs by rule is what torch counts of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from crate_dist.config import ModelSection
from crate_dist.config.archs import ARCHS
from crate_dist.config.parts import HEADS, PARTS
from crate_dist.models import costs
from crate_dist.models.config import ModelConfig, model_config
from crate_dist.models.costs import RULES
from crate_dist.models.transformer import Transformer

OF_TOST = {"class_token": False, "positions": "fourier"}
MODELS: list[dict[str, Any]] = [
    *({"stem": name} for name in RULES["stem"]),
    *({"mixer": name} for name in RULES["mixer"]),
    *({"tokenwise": name, "residual": residual} for name in RULES["tokenwise"] for residual in RULES["residual"]),
    *({"tokenwise": name, "residual": "pre_norm", "layer_scale": 0.5} for name in RULES["tokenwise"]),
    *({"head": name} | (OF_TOST if HEADS[name].class_token is False else {}) for name in RULES["head"]),
    {"mixer": "cbsa", "options": {"cells": 3}},
    {"mixer": "mssa", "out_bias": False, "ratio": 3, "tokenwise": "mlp"},
    {"mixer": "attention", "in_bias": False, "out_bias": False, "class_token": False, "pool": "mean"},
    {"mixer": "tssa", "in_bias": False},
    {"heads": 1, "pool": "mean", "image_size": 16},  # so few tokens that ISTA takes two products
    OF_TOST
    | {"stem": "convolutions", "mixer": "tssa", "tokenwise": "mlp", "residual": "pre_norm", "layer_scale": 1.0}
    | {"head": "class_attention"},
]
IMAGES = 4


def name_of(given: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in given.items())


@pytest.fixture(params=MODELS, ids=name_of)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    base = {"image_size": 48, "patch_size": 8, "num_classes": 10, "dim": 64, "depth": 1, "heads": 4}
    return ModelConfig(**(base | request.param))


def meta(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config).to("meta")


def test_every_rule_is_that_of_a_part() -> None:
    for part, table in PARTS.items():
        assert table.keys() >= RULES[part].keys()


@pytest.mark.parametrize("arch", ARCHS)
def test_the_parameters_of_every_arch_are_those_of_the_model(arch: str) -> None:
    config = model_config(ModelSection(arch=arch), 1000)
    assert costs.parameters(config) == sum(p.numel() for p in meta(config).parameters())


def test_parameters_and_operations_are_exactly_those_that_torch_counts(config: ModelConfig) -> None:
    model = meta(config)
    assert costs.parameters(config) == sum(p.numel() for p in model.parameters())
    model.set_execution(images=IMAGES)
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.empty(IMAGES, 3, config.image_size, config.image_size, device="meta"))
        assert counter.get_total_flops() == costs.forward_flops(config, IMAGES)
        logits.sum().backward()
    assert counter.get_total_flops() == costs.step_flops(config, IMAGES)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_autograd_keeps_is_what_was_foretold(config: ModelConfig, precision: str) -> None:
    assert costs.kept_bytes(config, IMAGES, precision) == pytest.approx(kept(config, precision), rel=0.02)


@pytest.mark.parametrize("arch", ["crate_demo", "cbt_tiny", "tost_tiny_12"])
def test_what_autograd_keeps_with_autocast_is_what_was_foretold(arch: str) -> None:
    # Within more, since autocast differs by device: on a CPU norms read bf16 where the tokens are.
    config = model_config(ModelSection(arch=arch, image_size=64, patch_size=8, depth=2), 10)
    assert costs.kept_bytes(config, IMAGES, "autocast") == pytest.approx(kept(config, "autocast"), rel=0.1)


def kept(config: ModelConfig, precision: str) -> int:
    """Returns the bytes of the storages that autograd keeps of a forward pass, but for the weights."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = Transformer(config).to(dtype)
    model.set_execution(autocast=precision == "autocast", images=IMAGES)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(torch.randn(IMAGES, 3, config.image_size, config.image_size, dtype=dtype))
    assert logits.requires_grad
    return sum(storage.nbytes() for storage in found.values())


def test_a_part_without_a_rule_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(costs.RULES["mixer"], "cbsa")
    with pytest.raises(costs.NotKnown, match=r"mixer = 'cbsa' costs is not known"):
        costs.step_flops(model_config(ModelSection(arch="cbt_tiny"), 10), 1)
