"""CRATE computes what the published code computes, and hands out what it computed on the way."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import lion_pytorch
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from crate_dist.config import ModelSection
from crate_dist.models import matmul as products
from crate_dist.models.build import ARCHS, build_model, find_arch, initialise, model_config
from crate_dist.models.config import ModelConfig
from crate_dist.models.costs import forward_flops, step_flops
from crate_dist.models.mixers.mssa import MSSA
from crate_dist.models.residuals.crate import CrateLayer
from crate_dist.models.tokenwise.ista import ISTA
from crate_dist.models.transformer import Transformer
from crate_dist.models.weights.families import FAMILIES
from crate_dist.models.weights.names import from_reference, to_reference
from crate_dist.models.weights.write import export_reference

GOLDEN = Path(__file__).parents[1] / "golden" / "crate_parity.pt"
SMALL = ModelConfig(image_size=16, patch_size=4, num_classes=7, dim=24, depth=2, heads=3)
DEMO = ModelSection(arch="crate_demo", image_size=32, patch_size=4)


@pytest.fixture(autouse=True)
def _same_images_each_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return torch.load(GOLDEN, weights_only=True)


@pytest.fixture(params=[False, True], ids=["ista in two products", "in one"])
def model(golden: dict[str, Any], request: pytest.FixtureRequest) -> Transformer:
    config = {key: value for key, value in golden["config"].items() if key != "dim_head"}
    model = Transformer(ModelConfig(**config))
    model.load_state_dict(from_reference(golden["state_dict"]))
    for layer in model.layers:
        assert isinstance(layer, CrateLayer)
        layer.tokenwise.one_product = request.param
    return model


@pytest.fixture
def reference() -> ModuleType:
    """The published model/crate.py from a checkout that $CRATE_REFERENCE names."""
    checkout = os.environ.get("CRATE_REFERENCE")
    if not checkout:
        pytest.skip("CRATE_REFERENCE names no checkout of the published code")
    spec = importlib.util.spec_from_file_location("reference_crate", Path(checkout) / "model" / "crate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def largest_difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@torch.no_grad()
def test_logits_attention_and_features_equal_the_published_codes(model: Transformer, golden: dict[str, Any]) -> None:
    seen = model.forward_intermediates(golden["images"])
    attention = torch.stack([seen.attention(layer) for layer in range(len(seen.projections))])
    assert largest_difference(model(golden["images"]), golden["logits"]) < 1e-5
    assert largest_difference(attention, golden["attention"]) < 1e-5
    assert largest_difference(torch.stack(seen.features), golden["features"]) < 1e-5


@torch.no_grad()
def test_intermediates_deliver_the_coding_rate_and_the_sparsity(model: Transformer, golden: dict[str, Any]) -> None:
    seen = model.forward_intermediates(golden["images"])
    for w, features, (mean, std), zeros in zip(
        seen.projections, seen.features, golden["coding_rate"], golden["sparsity_zero_fraction"], strict=True
    ):
        tokens, width = w.shape[-2:]
        w = w / w.norm(dim=-1, keepdim=True)
        gram = torch.eye(tokens) + width / (tokens * 0.01) * (w @ w.mT)
        rate = torch.logdet(gram).sum(dim=-1) / 2
        assert rate.mean().item() == pytest.approx(mean, rel=1e-4)
        assert rate.std().item() == pytest.approx(std, rel=1e-3)
        assert (features == 0).float().mean().item() == pytest.approx(zeros, abs=1e-4)


def test_twelve_lion_steps_follow_the_published_code(model: Transformer, golden: dict[str, Any]) -> None:
    train = golden["train"]
    optimizer = lion_pytorch.Lion(model.parameters(), lr=train["lr"], weight_decay=train["weight_decay"])
    losses = []
    for images, labels in zip(train["images"], train["labels"], strict=True):
        loss = F.cross_entropy(model(images), labels, label_smoothing=train["label_smoothing"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(train["losses"], abs=1e-4)
    final = from_reference(train["final_state_dict"])
    off = torch.cat([(tensor - final[name]).abs().flatten() for name, tensor in model.state_dict().items()])
    # Lion steps by the sign: where a gradient is zero up to rounding, one step may go the other way.
    assert (off > 1e-6).float().mean() < 1e-3
    assert off.max() <= 2 * len(losses) * train["lr"]


@torch.no_grad()
def test_the_same_pass_with_and_without_intermediates() -> None:
    model = initialise(SMALL, seed=1)
    images = torch.randn(3, 3, 16, 16)
    seen = model.forward_intermediates(images)
    assert torch.equal(seen.logits, model(images))
    assert [tuple(w.shape) for w in seen.projections] == [(3, 3, 17, 8)] * 2
    assert [tuple(z.shape) for z in seen.features] == [(3, 17, 24)] * 2
    assert torch.allclose(seen.attention(0).sum(dim=-1), torch.ones(3, 3, 17))


@pytest.mark.parametrize(
    ("arch", "millions"),
    [("crate_tiny", 6.09), ("crate_small", 13.12), ("crate_base", 22.80), ("crate_large", 77.64)],
)
def test_the_sizes_have_the_published_numbers_of_parameters(arch: str, millions: float) -> None:
    config = model_config(ModelSection(arch=arch), num_classes=1000)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Transformer(config).parameters())
    assert round(parameters / 1e6, 2) == millions


def test_every_arch_of_the_recipes_is_known_and_told_from_its_shape() -> None:
    for family in FAMILIES:
        for name, patches in family.sizes.items():
            assert {family.published(ARCHS[name].dim, ARCHS[name].depth, patch) for patch in patches} == {name}
            assert family.published(ARCHS[name].dim, ARCHS[name].depth, 7) is None
    assert all(family.published(96, 4, 16) is None for family in FAMILIES)  # the demo's
    for name in ARCHS:
        assert find_arch(model_config(ModelSection(arch=name), 10)) == name


def test_first_weights_are_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    one = build_model(DEMO, 10, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1234)
    same, other = build_model(DEMO, 10, seed=5).state_dict(), build_model(DEMO, 10, seed=6).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["cls_token"], other["cls_token"])


def test_first_weights_have_the_published_distribution() -> None:
    config = ModelConfig(image_size=64, patch_size=8, num_classes=100, dim=256, depth=1, heads=4)
    state = initialise(config, seed=0).state_dict()
    uniform = {
        "layers.0.ista.dictionary": math.sqrt(6 / 256),  # Kaiming with the gain of ReLU
        "layers.0.mssa.subspaces.weight": 1 / math.sqrt(256),  # nn.Linear's own
        "layers.0.mssa.out.weight": 1 / math.sqrt(256),
        "patch_embed.proj.weight": 1 / math.sqrt(3 * 64),
        "head.linear.weight": 1 / math.sqrt(256),
    }
    for name, bound in uniform.items():
        assert state[name].abs().max() <= bound
        assert state[name].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert abs(state[name].mean().item()) < 0.02 * bound
    assert state["pos_embedding"].std().item() == pytest.approx(1, rel=0.03)
    assert state["cls_token"].std().item() == pytest.approx(1, rel=0.2)


def test_first_weights_are_those_of_the_published_code_at_the_same_seed() -> None:
    state = initialise(SMALL, seed=7).state_dict()
    sums = {name: state[name].double().sum().item() for name in state}
    # Taken from the published class, created after torch.manual_seed(7).
    assert sums["patch_embed.proj.weight"] == pytest.approx(-0.380993, abs=1e-4)
    assert sums["pos_embedding"] == pytest.approx(-37.645892, abs=1e-3)
    assert sums["cls_token"] == pytest.approx(-0.521591, abs=1e-4)
    assert sums["layers.1.ista.dictionary"] == pytest.approx(1.971861, abs=1e-4)
    assert sums["head.linear.bias"] == pytest.approx(-0.342206, abs=1e-4)


def test_the_published_class_draws_and_computes_the_same(reference: ModuleType) -> None:
    torch.manual_seed(7)
    theirs = reference.Transformer(image_size=16, patch_size=4, num_classes=7, dim=24, depth=2, heads=3, dim_head=8)
    ours = initialise(SMALL, seed=7)
    state = to_reference(ours.state_dict())
    assert list(state) == list(theirs.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in theirs.state_dict().items())
    images = torch.randn(2, 3, 16, 16)
    assert largest_difference(ours(images), theirs(images)) < 1e-5


def test_the_published_class_loads_what_is_written(reference: ModuleType, tmp_path: Path) -> None:
    theirs = reference.Transformer(image_size=16, patch_size=4, num_classes=7, dim=24, depth=2, heads=3, dim_head=8)
    ours = initialise(SMALL, seed=3)
    wrapped = torch.nn.DataParallel(theirs)
    images = torch.randn(2, 3, 16, 16)
    for prefix, target in (("", theirs), ("module.", wrapped)):
        export_reference(tmp_path / "weights.pth.tar", SMALL, ours.state_dict(), prefix=prefix)
        content = torch.load(tmp_path / "weights.pth.tar", weights_only=True)
        theirs.apply(lambda module: [parameter.data.zero_() for parameter in module.parameters()])
        target.load_state_dict(content["state_dict"], strict=True)
        assert largest_difference(ours(images), theirs(images)) < 1e-5


@settings(max_examples=25, deadline=None)
@given(heads=st.integers(1, 4), width=st.integers(1, 6), tokens=st.integers(1, 9), seed=st.integers(0, 2**31 - 1))
def test_the_two_operators_are_the_papers(heads: int, width: int, tokens: int, seed: int) -> None:
    torch.manual_seed(seed)
    dim = heads * width
    z = torch.randn(2, tokens, dim)
    config = replace(SMALL, dim=dim, heads=heads, ista_step=0.3, ista_threshold=0.2)
    mssa, ista = MSSA(config), ISTA(config)
    compressed = []
    for u in mssa.subspaces.get_parameter("weight").view(heads, width, dim):
        w = z @ u.T
        compressed.append(torch.softmax(w @ w.mT / math.sqrt(width), dim=-1) @ w)
    assert torch.allclose(mssa(z), mssa.out.forward(torch.cat(compressed, dim=-1)), atol=1e-5)
    d = ista.dictionary
    published = torch.relu(z + 0.3 * (z @ d - z @ d.T @ d) - 0.3 * 0.2)
    assert torch.allclose(ista(z), published, atol=1e-4)
    order = torch.randperm(tokens)
    assert torch.allclose(mssa(z[:, order]), mssa(z)[:, order], atol=1e-5)


def gradients(model: Transformer, images: Tensor, of_one_product: bool) -> list[Tensor]:
    model.set_execution(images=1000 if of_one_product else 1)
    return list(torch.autograd.grad(model(images).square().sum(), list(model.parameters())))


def test_ista_in_one_product_and_in_two_are_the_same_function() -> None:
    model, images = initialise(SMALL, seed=1).double(), torch.randn(3, 3, 16, 16, dtype=torch.float64)
    two, one = (gradients(model, images, form) for form in (False, True))
    assert any(not torch.equal(a, b) for a, b in zip(one, two, strict=True)), "both were computed in the same way"
    for a, b in zip(one, two, strict=True):
        assert largest_difference(a, b) <= 1e-12 * b.abs().max()


def test_in_bf16_one_product_is_as_near_to_the_exact_gradients_as_two() -> None:
    torch.manual_seed(0)
    config = replace(SMALL, dim=192, ista_threshold=-100)
    exact = ISTA(config)  # no entry is cut off: where rounding decides that, it drowns all else
    exact.dictionary.data = exact.dictionary.bfloat16().double()
    z, upstream = (torch.randn(900, 192).bfloat16() for _ in range(2))

    def computed(dtype: torch.dtype, one_product: bool) -> list[Tensor]:
        ista = ISTA(config)
        ista.dictionary.data = exact.dictionary.to(dtype)
        ista.one_product = one_product
        x = z.to(dtype).requires_grad_()
        y = ista(x)
        grads = torch.autograd.grad(y, [x, ista.dictionary], upstream.to(dtype))
        return [tensor.detach().double() for tensor in (y, *grads)]

    reference = computed(torch.float64, False)
    two, one = (
        [((a - b).norm() / b.norm()).item() for a, b in zip(computed(torch.bfloat16, form), reference, strict=True)]
        for form in (False, True)
    )
    assert one[0] < 1.01 * two[0]
    assert one[1] < 0.8 * two[1]  # of the tokens
    assert one[2] < 1.01 * two[2]  # of the dictionary


def test_the_way_that_takes_fewer_operations_is_chosen_once_for_all_passes() -> None:
    config = model_config(ModelSection(arch="crate_demo", image_size=32, patch_size=4), 10)  # 65 tokens, 96 features
    with torch.device("meta"):
        model, images = Transformer(config), torch.randn(8, 3, 32, 32)
    counted = {}
    for micro_batch in (1, 8):
        model.set_execution(images=micro_batch)
        with FlopCounterMode(display=False) as counter:
            model(images)
        counted[micro_batch] = counter.get_total_flops()
    per_layer = 2 * (8 * 65 * 96**2 - 96**3)
    assert counted[1] - counted[8] == config.depth * per_layer
    assert counted[8] == forward_flops(config, 8)
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    assert counter.get_total_flops() == step_flops(config, 8)


def test_a_single_head_has_no_output_projection_and_mean_pooling_reads_all_tokens() -> None:
    config = ModelConfig(image_size=8, patch_size=4, num_classes=3, dim=6, depth=1, heads=1, pool="mean")
    model = initialise(config, seed=0)
    assert not any("mssa.out" in name for name in model.state_dict())
    images = torch.randn(2, 3, 8, 8)
    features = model.forward_intermediates(images).features[-1]
    assert torch.equal(model(images), model.head.linear(model.head.norm(features.mean(dim=1))))


@torch.no_grad()
def test_bf16_and_autocast_stay_near_fp32() -> None:
    model = build_model(DEMO, 10, seed=0)
    images = torch.randn(8, 3, 32, 32)
    exact = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = model(images)
    rounded = model.bfloat16()(images.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    for logits in (autocast, rounded):
        assert largest_difference(logits.float(), exact) < 0.1 * exact.std()


def test_gradients_reach_every_parameter_and_a_pass_changes_none() -> None:
    model = initialise(SMALL, seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_the_memory_format_of_the_images_does_not_matter() -> None:
    model = initialise(SMALL, seed=0)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(images.contiguous(memory_format=torch.channels_last)), model(images))


@torch.no_grad()
def test_dropout_acts_in_training_only() -> None:
    still = initialise(SMALL, seed=0)
    model = Transformer(ModelConfig(**{**vars(SMALL), "dropout": 0.3, "emb_dropout": 0.2}))
    model.load_state_dict(still.state_dict())
    images = torch.randn(2, 3, 16, 16)
    assert not torch.equal(model(images), still(images))
    assert torch.equal(model.eval()(images), still(images))
    attention = MSSA(
        replace(SMALL, dim=8, heads=1, dropout=0.5)
    )  # a single head: nothing but the attention map is dropped
    z = torch.randn(1, 6, 8)
    draws = torch.stack([attention(z) for _ in range(2000)])
    assert (draws[0] != draws[1]).any()
    assert torch.allclose(draws.mean(dim=0), attention.eval()(z), atol=0.1)


@torch.no_grad()
def test_the_forward_pass_is_one_graph() -> None:
    model = initialise(SMALL, seed=0)
    images = torch.randn(2, 3, 16, 16)
    traced = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(traced(images), model(images))


def test_what_does_not_fit_is_said() -> None:
    model = initialise(SMALL, seed=0)
    with pytest.raises(ValueError, match=r"\(b, 3, 16, 16\), got \(2, 3, 8, 8\)"):
        model(torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="no multiple of patch_size"):
        ModelConfig(**{**vars(SMALL), "patch_size": 5})
    with pytest.raises(ValueError, match="does not divide into 5 heads"):
        ModelConfig(**{**vars(SMALL), "heads": 5})
    with pytest.raises(ValueError, match="num_classes is 5, but the data has 10"):
        build_model(DEMO.model_copy(update={"num_classes": 5}), 10, seed=0)


def test_products_by_onednn_are_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 197, 384, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(192, 384) / 384**0.5)
    bias = torch.nn.Parameter(torch.randn(192))
    upstream = torch.randn(4, 197, 192)
    results = []
    for onednn in (True, False):
        monkeypatch.setattr(products, "ONEDNN", onednn)
        y = products.linear(x, weight, bias)
        results.append([y, *torch.autograd.grad(y, [x, weight, bias], upstream)])
    for ours, torchs in zip(*results, strict=True):
        assert torch.allclose(ours, torchs, atol=1e-4 * torchs.abs().max().item())
