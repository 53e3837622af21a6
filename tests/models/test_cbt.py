"""CBT computes what its published code computes; its checkpoints come in and go out; the aligned grid is right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lion_pytorch
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_dist.config import ModelSection, RecipeError, load_recipe
from crate_dist.config.archs import ARCHS
from crate_dist.models.adapt import adapt
from crate_dist.models.batch_norm import statistics, take_statistics
from crate_dist.models.build import find_arch, initialise, model_config
from crate_dist.models.config import ModelConfig
from crate_dist.models.mixers.cbsa import CBSA, AlignedCBSA
from crate_dist.models.transformer import Transformer
from crate_dist.models.weights.families.cbt import FAMILY
from crate_dist.models.weights.names import from_reference
from crate_dist.models.weights.read import load_model, read_weights
from crate_dist.models.weights.write import export_model, export_reference

GOLDEN = Path(__file__).parents[1] / "golden" / "cbsa_parity.pt"


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return torch.load(GOLDEN, weights_only=True)


@pytest.fixture(scope="module")
def config(golden: dict[str, Any]) -> ModelConfig:
    numbers = {
        key: golden["config"][key] for key in ("image_size", "patch_size", "num_classes", "dim", "depth", "heads")
    }
    parts = ("stem", "mixer", "tokenwise", "residual", "head")
    return ModelConfig(**numbers, **{part: getattr(ARCHS["cbt_tiny"], part) for part in parts})


@pytest.fixture
def model(config: ModelConfig, golden: dict[str, Any]) -> Transformer:
    model = Transformer(config)
    model.load_state_dict(from_reference(golden["state_dict"]))
    return model.eval()


def off(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()


def assert_gradients(model: Transformer, theirs: dict[str, Tensor]) -> None:
    """Asserts that each parameter's gradient is the published code's, within 1e-4 of its norm."""
    expected, ours = from_reference(theirs), {name: p.grad for name, p in model.named_parameters()}
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        assert gradient is not None
        assert ((gradient - expected[name]).norm() / expected[name].norm()).item() < 1e-4, name


def loss_of(model: Transformer, golden: dict[str, Any]) -> Tensor:
    return F.cross_entropy(model(golden["images"]), golden["labels"], label_smoothing=0.1)


@torch.no_grad()
def test_what_is_computed_on_the_way_is_the_published_codes(model: Transformer, golden: dict[str, Any]) -> None:
    seen = model.forward_intermediates(golden["images"])
    assert off(model(golden["images"]), golden["logits"]) < 1e-5
    for layer, (w, mixer) in enumerate(zip(seen.projections, seen.mixers, strict=True)):
        assert isinstance(mixer, CBSA)
        assert off(seen.features[layer], golden["features"][layer]) < 1e-5
        assert off(mixer.contraction(w), golden["contraction"][layer]) < 1e-5
        assert off(mixer.representative_attention(w), golden["representative_attention"][layer]) < 1e-5
        assert off(mixer.attend(w), golden["cbsa_outputs"][layer]) < 1e-5
        assert off(seen.attention(layer), golden["attention"][layer]) < 1e-5
        assert off(mixer.attention(w, slice(2)), golden["attention"][layer][..., :2, :]) < 1e-5


def test_gradients_and_twelve_lion_steps_follow_the_published_code(model: Transformer, golden: dict[str, Any]) -> None:
    lion = golden["lion"]
    optimizer = lion_pytorch.Lion(model.parameters(), lr=lion["lr"], weight_decay=lion["weight_decay"])
    losses = []
    for step in range(lion["steps"]):
        optimizer.zero_grad()
        loss = loss_of(model, golden)
        loss.backward()
        if step == 0:
            assert_gradients(model, golden["grads"])
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(golden["lion_losses"], abs=1e-4)


def test_training_takes_the_statistics_of_the_batch_as_published(model: Transformer, golden: dict[str, Any]) -> None:
    theirs = golden["train_mode"]
    loss = loss_of(model.train(), golden)
    loss.backward()
    assert loss.item() == pytest.approx(theirs["loss"], abs=1e-5)
    assert_gradients(model, theirs["grads"])
    take_statistics(model, statistics(model))
    state = model.state_dict()
    for name, buffer in FAMILY.to_ours(theirs["buffers_after"]).items():
        assert off(state[name].float(), buffer.float()) < 1e-6, name


@pytest.mark.parametrize(("size", "millions"), [("tiny", 1.79), ("small", 6.67), ("base", 25.69), ("large", 83.05)])
def test_the_sizes_have_the_published_numbers_of_parameters(size: str, millions: float) -> None:
    config = model_config(ModelSection(arch=f"cbt_{size}"), num_classes=1000)
    with torch.device("meta"):
        model = Transformer(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    assert find_arch(config) == f"cbt_{size}"


def test_first_weights_are_drawn_in_the_published_order(config: ModelConfig) -> None:
    state = initialise(config, seed=3).state_dict()
    dim, heads = config.dim, config.heads
    torch.manual_seed(3)
    for number, (before, after) in enumerate(((3, 12), (12, 24), (24, dim))):
        drawn = nn.Conv2d(before, after, 3, bias=False).weight
        assert torch.equal(state[f"patch_embed.convolutions.{number}.weight"], drawn)
    assert torch.equal(state["pos_embedding"], torch.randn(1, 101, dim))
    assert torch.equal(state["cls_token"], torch.randn(1, 1, dim))
    for layer in range(config.depth):
        assert torch.equal(state[f"layers.{layer}.cbsa.subspaces.weight"], nn.Linear(dim, dim, bias=False).weight)
        assert torch.equal(state[f"layers.{layer}.cbsa.step_x"], torch.randn(heads, 1, 1))
        assert torch.equal(state[f"layers.{layer}.cbsa.step_rep"], torch.randn(heads, 1, 1))
        assert torch.equal(state[f"layers.{layer}.cbsa.out.weight"], nn.Linear(dim, dim).weight)
        dictionary = nn.init.kaiming_uniform_(torch.empty(dim, dim))
        assert torch.equal(state[f"layers.{layer}.ista.dictionary"], dictionary)
    assert torch.equal(state["head.linear.weight"], nn.Linear(dim, 10).weight)


def test_its_checkpoints_come_in_and_go_out(
    model: Transformer, config: ModelConfig, golden: dict[str, Any], tmp_path: Path
) -> None:
    theirs, ours = tmp_path / "model_best.pth.tar", tmp_path / "ours.pth.tar"
    weights = {f"module.{name}": tensor for name, tensor in golden["state_dict"].items()}
    parameters = [nn.Parameter(tensor) for tensor in weights.values() if tensor.is_floating_point()]
    optimizer = lion_pytorch.Lion(parameters, lr=2e-4, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    beside = {"epoch": 150, "arch": "Ours_small", "best_acc1": torch.tensor(71.4), "state_dict": weights}
    torch.save(beside | {"optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict()}, theirs)
    found, meta = load_model(theirs)
    assert (found.config, meta["epoch"], meta["arch"]) == (config, 150, "Ours_small")
    assert off(found.eval()(golden["images"]), golden["logits"]) < 1e-5
    export_reference(ours, config, model.state_dict(), meta)
    written = torch.load(ours, weights_only=True)
    assert written["state_dict"].keys() == weights.keys()
    assert all(torch.equal(written["state_dict"][name], tensor) for name, tensor in weights.items())
    assert read_weights(ours).architecture()[0] == config


def aligned(config: ModelConfig, **other: Any) -> AlignedCBSA:
    torch.manual_seed(0)
    return AlignedCBSA(replace(config, mixer="cbsa_aligned", **other))


@torch.no_grad()
@pytest.mark.parametrize(("rows", "cols"), [(10, 10), (5, 20), (16, 8), (3, 2)])
def test_aligned_cells_are_means_of_the_patches_that_lie_in_them(config: ModelConfig, rows: int, cols: int) -> None:
    mixer = aligned(config)
    mixer.set_grid(rows, cols)
    w = torch.randn(2, 3, 1 + rows * cols, 16)
    patches = w[:, :, 1:].unflatten(2, (rows, cols))
    pooled = mixer.pool(w).unflatten(2, (8, 8))
    for row in range(8):
        for col in range(8):
            cell = patches[
                :, :, row * rows // 8 : -(-(row + 1) * rows // 8), col * cols // 8 : -(-(col + 1) * cols // 8)
            ]
            assert off(pooled[:, :, row, col], cell.mean(dim=(2, 3))) < 1e-6
    assert off(mixer.pool(w[:, :, 1:]), pooled.flatten(2, 3)) == 0  # a model without a class token


@torch.no_grad()
def test_wide_images_are_refused_as_published_and_taken_with_the_grid_in_its_place(config: ModelConfig) -> None:
    wide, square = torch.randn(1, 3, 40, 160), torch.randn(1, 3, 80, 80)  # as many patches, 5 x 20 and 10 x 10
    with pytest.raises(ValueError, match=r'square grid of patches, not 5 x 20.*mixer = "cbsa_aligned"'):
        initialise(config, seed=0).forward_intermediates(wide)
    model = initialise(replace(config, mixer="cbsa_aligned"), seed=0).eval()
    before = model(square)
    seen = model.forward_intermediates(wide)
    mixer = seen.mixers[0]
    assert isinstance(mixer, AlignedCBSA)
    assert mixer.grid == (5, 20)
    assert seen.attention(0).shape == (1, 3, 101, 101)
    assert torch.equal(model(square), before)  # which lays its own grid again


@torch.no_grad()
def test_published_cells_refuse_tokens_without_a_class_token(config: ModelConfig) -> None:
    with pytest.raises(ValueError, match="takes a class token and a square grid of patches, not 100 tokens"):
        CBSA(config).pool(torch.randn(1, 3, 100, 16))
    with pytest.raises(ValueError, match=r"needs a class token.*another mixer: .*cbsa_aligned"):
        replace(config, class_token=False, pool="mean")
    with pytest.raises(RecipeError, match=r"needs a class token.*another mixer: .*cbsa_aligned"):
        load_recipe("cbt_tiny", ["model.class_token=false", "model.pool=mean"])


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_bf16_is_near_to_fp32_forward_and_backward(model: Transformer, golden: dict[str, Any], precision: str) -> None:
    model.set_execution(autocast=precision == "autocast", recompute=1)
    images = golden["images"]
    if precision == "bf16":
        model, images = model.bfloat16(), images.bfloat16()
    logits = model(images).float()
    logits.sum().backward()
    assert off(logits, golden["logits"]) < 0.1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_grid_s_cells_are_an_option_that_exports_keep_and_other_runs_are_told(
    config: ModelConfig, tmp_path: Path
) -> None:
    coarse = initialise(replace(config, options={"cells": 3}), seed=0)
    weights = tmp_path / "model.pt"
    export_model(weights, coarse.config, coarse.state_dict())
    found, _ = load_model(weights)
    assert found.config == coarse.config
    mixer = found.get_submodule("layers.0.cbsa")
    assert isinstance(mixer, CBSA)
    assert mixer.contraction(torch.randn(2, config.heads, config.num_tokens, 8)).shape[2] == 9
    notes = adapt(coarse.state_dict(), coarse.config, config, new_head=False).notes
    assert notes == ("options {'cells': 3} there and {'cells': 8} here",)


def test_the_published_training_code_takes_up_the_optimizer_and_whose_weights_they_are_is_told(
    tmp_path: Path, config: ModelConfig, model: Transformer
) -> None:
    path = tmp_path / "ema.pth.tar"
    export_reference(path, config, model.state_dict(), {"ema_decay": 0.99})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)  # whose parameters are those of the published class
    optimizer.load_state_dict(torch.load(path, weights_only=True)["optimizer"])
    assert read_weights(path).meta["ema_decay"] == 0.99
