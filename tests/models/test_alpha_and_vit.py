"""CRATE-α and ViT compute what their published codes compute, and their weights go in and out."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lion_pytorch
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crate_dist.checkpoint.trained import load_trained
from crate_dist.config import ImageSection, ModelSection
from crate_dist.config.archs import ARCHS
from crate_dist.models.build import build_model, initialise, model_config
from crate_dist.models.config import ModelConfig
from crate_dist.models.residuals.pre_norm import PreNormLayer
from crate_dist.models.transformer import Transformer
from crate_dist.models.weights.__main__ import main
from crate_dist.models.weights.families.vit import TIMM
from crate_dist.models.weights.names import WeightsError, from_reference, to_reference
from crate_dist.models.weights.read import load_model, read_weights
from crate_dist.models.weights.write import export_reference

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 48, "depth": 3, "heads": 4}
ALPHA = ModelConfig(**asdict(ARCHS["crate_alpha_base"]) | SMALL)
VIT = ModelConfig(**asdict(ARCHS["vit_tiny"]) | SMALL)


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, Any]]:
    """What the published codes computed, of CRATE-α with two sets of weights and of ViT."""
    alpha, vit = (torch.load(GOLDEN / f"{name}_parity.pt", weights_only=True) for name in ("crate_alpha", "vit"))
    return {"alpha": alpha, "perturbed": alpha | alpha["perturbed"], "vit": vit}


def built(values: dict[str, Any], config: ModelConfig) -> Transformer:
    model = Transformer(config)
    model.load_state_dict(from_reference(values["state_dict"]))
    return model.eval()


def off(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


EACH = pytest.mark.parametrize(("name", "config"), [("alpha", ALPHA), ("perturbed", ALPHA), ("vit", VIT)])


@EACH
def test_logits_features_attention_and_gradients_equal_the_published_codes(
    golden: dict[str, dict[str, Any]], name: str, config: ModelConfig
) -> None:
    values = golden[name]
    model = built(values, config)
    seen = model.forward_intermediates(values["images"])
    assert off(seen.logits, values["logits"]) < 1e-5
    assert off(model(values["images"]), values["logits"]) < 1e-5
    for layer, (features, attention) in enumerate(zip(values["features"], values["attention"], strict=True)):
        assert off(seen.features[layer], features) < 1e-5
        assert off(seen.attention(layer), attention) < 1e-5
    loss = F.cross_entropy(seen.logits, values["labels"], label_smoothing=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(values["loss"], abs=1e-5)
    expected = from_reference(values["grads"])
    for parameter, tensor in model.named_parameters():
        assert tensor.grad is not None
        assert (tensor.grad - expected[parameter]).norm() <= 1e-4 * expected[parameter].norm(), parameter


@EACH
def test_twelve_lion_steps_follow_the_published_codes(
    golden: dict[str, dict[str, Any]], name: str, config: ModelConfig
) -> None:
    values = golden[name]
    model, lion = built(values, config), values["lion"]
    optimizer = lion_pytorch.Lion(model.parameters(), lr=lion["lr"], weight_decay=lion["weight_decay"])
    losses = []
    for _ in range(lion["steps"]):
        loss = F.cross_entropy(model(values["images"]), values["labels"], label_smoothing=lion["label_smoothing"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(values["lion_losses"], abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["alpha", "perturbed"])
def test_odl_and_mssa_alone_equal_the_published_code(golden: dict[str, dict[str, Any]], name: str) -> None:
    values = golden[name]
    model = built(values, ALPHA)
    z = model.embed(values["images"])
    for layer, mixed, coded in zip(model.layers, values["mssa_outputs"], values["odl_outputs"], strict=True):
        assert isinstance(layer, PreNormLayer)
        w = layer.project(z)
        assert off(layer.mixer.attend(w), mixed) < 1e-5
        read = layer.reads(layer.compress(z, w))
        assert off(layer.tokenwise(read), coded) < 1e-5
        code = layer.tokenwise.code(read)
        assert code is not None
        assert code.shape == (*read.shape[:2], 4 * ALPHA.dim)
        assert code.min() == 0
        assert off(F.linear(code, layer.tokenwise.get_parameter("out")), coded) < 1e-5
        z = layer.update(z, w)


@torch.no_grad()
def test_the_norm_applied_twice_is_the_published_head_and_once_the_corrected_one(
    golden: dict[str, dict[str, Any]],
) -> None:
    values = golden["vit"]
    assert off(built(values, VIT)(values["images"]), values["logits"]) < 1e-5
    once = built(values, replace(VIT, head="mean_patches"))
    assert off(once(values["images"]), values["logits_fc_norm_once"]) < 1e-5
    assert off(values["logits"], values["logits_fc_norm_once"]) > 1e-3


@torch.no_grad()
def test_the_steps_of_the_ablation_are_the_paper_s_formulas() -> None:
    """Overcomplete, decoupled, residual: each by a name in the recipe; the formulas as they are written, in fp64."""
    tokens = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    coupled, decoupled = (
        initialise(replace(ALPHA, tokenwise=name, residual="crate", ratio=2), seed=2).layers[0].double()
        for name in ("odl_coupled", "odl")
    )
    for layer in (coupled, decoupled):
        assert isinstance(layer.get_submodule("odl_norm"), torch.nn.LayerNorm)
        odl = layer.get_submodule("odl")
        d = odl.get_parameter("dictionary")
        out = odl.get_parameter("out") if layer is decoupled else d
        assert d.shape == (48, 96)
        z1 = (0.1 * tokens @ d - 0.01).relu()
        z2 = (z1 - 0.1 * (z1 @ d.T - tokens) @ d - 0.01).relu()
        assert off(odl(tokens), z2 @ out.T) < 1e-12
        normed = layer.get_submodule("mssa_norm")(tokens)
        mixed = tokens + layer.get_submodule("mssa")(normed)
        assert off(layer(tokens), odl(layer.get_submodule("odl_norm")(mixed))) < 1e-12  # no residual about ODL
    assert "layers.0.odl.out" not in initialise(replace(ALPHA, tokenwise="odl_coupled"), seed=0).state_dict()


@pytest.mark.parametrize(
    ("arch", "patch", "millions"),
    [
        ("crate_alpha_base", 16, 72.3),
        ("crate_alpha_large", 14, 253.7),
        ("crate_alpha_huge", 14, 526.8),
        ("vit_tiny", 16, 5.7),
        ("vit_small", 16, 22.1),
    ],
)
def test_the_sizes_have_the_published_numbers_of_parameters(arch: str, patch: int, millions: float) -> None:
    config = model_config(ModelSection(arch=arch, patch_size=patch), num_classes=1000)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Transformer(config).parameters())
    assert round(parameters / 1e6, 1) == millions


def test_first_weights_are_those_of_the_training_codes() -> None:
    alpha, vit = (initialise(replace(config, depth=1, dim=192), seed=0) for config in (ALPHA, VIT))
    for name, tensor in alpha.state_dict().items():
        expected = {
            "layers.0.odl.dictionary": math.sqrt(2 / 192),
            "layers.0.odl.out": math.sqrt(2 / 192),
            "patch_embed.proj.weight": math.sqrt(2 / (3 * 64)),
            "cls_token": 1e-6,
        }.get(name, 0.02)
        if "norm" not in name and "bias" not in name:
            assert tensor.std().item() == pytest.approx(expected, rel=0.25), name
    for model in (alpha, vit):
        state = model.state_dict()
        biases = [name for name in state if name.endswith("bias") and not (model is vit and "patch_embed" in name)]
        assert all(not state[name].any() for name in biases)
    assert vit.state_dict()["pos_embedding"].std().item() == pytest.approx(0.02, rel=0.1)
    assert vit.state_dict()["patch_embed.proj.bias"].any()
    one, other = (build_model(ModelSection(arch="vit_tiny", image_size=32), 3, seed=seed) for seed in (7, 7))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_published_weights_come_in_and_go_out_bit_for_bit(
    golden: dict[str, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    published = golden["perturbed"]["state_dict"]
    torch.save(published, tmp_path / "crate_alpha.pth")  # bare, as published
    model, meta = load_model(tmp_path / "crate_alpha.pth", heads=4)
    assert (model.config, meta) == (ALPHA, {"resize_filter": "bilinear"})
    main(
        ["convert", str(tmp_path / "crate_alpha.pth"), str(tmp_path / "ours.pt"), "--to", "crate-dist", "--heads", "4"]
    )
    main(["convert", str(tmp_path / "ours.pt"), str(tmp_path / "back.pth"), "--to", "reference"])
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(back) == list(published)
    assert all(torch.equal(back[name], published[name]) for name in published)
    export_reference(tmp_path / "eps.pth", replace(ALPHA, norm_eps=1e-5), model.state_dict())
    assert "norm_eps is 1e-06, this model's 1e-05; a bare state dict has no place for it" in caplog.text
    card = (tmp_path / "back.md").read_text(encoding="utf-8")
    assert "A [CRATE-α](https://arxiv.org/abs/2405.20299) image classifier" in card
    assert "yang2024scaling" in card


def test_vit_s_checkpoints_are_those_of_crate_s_training_code_and_timm_s_own_have_a_class_token(
    golden: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    published = golden["vit"]["state_dict"]
    wrapped = {f"module.{name}": tensor for name, tensor in published.items()}
    torch.save({"epoch": 3, "arch": "vit_tiny", "state_dict": wrapped, "best_acc1": 12.5}, tmp_path / "vit.pth.tar")
    model, meta = load_model(tmp_path / "vit.pth.tar", heads=4)
    assert (model.config, meta["arch"]) == (VIT, "vit_tiny")
    export_reference(tmp_path / "back.pth.tar", model.config, model.state_dict(), meta)
    back = torch.load(tmp_path / "back.pth.tar", weights_only=True)["state_dict"]
    assert back.keys() == wrapped.keys()
    assert all(torch.equal(back[name], wrapped[name]) for name in wrapped)
    assert load_model(tmp_path / "back.pth.tar")[0].config == VIT  # our checkpoint tells its heads

    timm = {name.replace("fc_norm", "norm"): tensor for name, tensor in published.items()}
    torch.save(timm, tmp_path / "timm.pth")
    assert load_model(tmp_path / "timm.pth", heads=4)[0].config == replace(VIT, head="linear")
    assert to_reference(read_weights(tmp_path / "timm.pth").state_dict).keys() == published.keys()


def test_what_timm_s_vit_does_not_say_is_said_and_can_be_given(
    golden: dict[str, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values, path, out = golden["vit"], tmp_path / "timm.pth", tmp_path / "timm.pt"
    torch.save({name.replace("fc_norm", "norm"): tensor for name, tensor in values["state_dict"].items()}, path)
    images = load_trained(path, heads=4).images
    assert (images.resize_filter, images.eval_crop, images.std) == ("bicubic", 0.9, ImageSection().std)
    assert "does not say how its images are prepared: taken as its DeiT (bicubic, eval_crop 0.9" in caplog.text
    augreg = ("--set", "images.mean=0.5,0.5,0.5", "--set", "images.std=[0.5, 0.5, 0.5]")
    main(["convert", str(path), str(out), "--to", "crate-dist", "--heads", "4", *augreg])
    caplog.clear()
    images = load_trained(out).images
    assert (images.mean, images.std, images.eval_crop) == ((0.5,) * 3, (0.5,) * 3, 0.9)
    assert caplog.text == ""
    for wrong, message in (
        ("images.mean=black", r"--set images\.mean: "),
        ("images.men=0.5,0.5,0.5", "expected one of images.resize_filter"),
        ("model.head=best", "--set model.head: head is one of linear"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["convert", str(path), str(out), "--to", "crate-dist", "--heads", "4", "--force", "--set", wrong])


def test_timm_s_vit_of_the_patches_has_the_names_of_crate_s_and_its_norm_is_applied_once(
    golden: dict[str, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values, path, out = golden["vit"], tmp_path / "timm.pth", tmp_path / "timm.pt"
    by_timm = {"epoch": 3, "arch": "vit_tiny_patch16_224", "state_dict": values["state_dict"], "version": 2}
    torch.save(by_timm, path)
    model, _ = load_model(path, heads=4)
    assert model.config == replace(VIT, head="mean_patches")
    assert off(model.eval()(values["images"]), values["logits_fc_norm_once"]) < 1e-5
    torch.save(values["state_dict"], path)
    assert load_model(path, heads=4)[0].config == VIT
    assert "applies that norm twice, or one of timm's with global_pool='avg'" in caplog.text
    others = {"model": values["state_dict"], "scaler": {}, "epoch": 3}
    for content, said in ((others, 1), ({"model": values["state_dict"], "scaler": {}}, 0)):  # CRATE's finetune.py's
        torch.save(content, tmp_path / "model.pth")
        assert len(read_weights(tmp_path / "model.pth").notes) == said
    main(["convert", str(path), str(out), "--to", "crate-dist", "--heads", "4", "--set", "model.head=mean_patches"])
    assert off(load_model(out)[0].eval()(values["images"]), values["logits_fc_norm_once"]) < 1e-5


def test_heads_that_are_taken_are_said_by_the_name_of_their_size(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(model_config(ModelSection(arch="vit_tiny", image_size=32), 5), head="linear")
    with torch.device("meta"):
        shapes = Transformer(config).state_dict()
    zeros = {name: torch.zeros(tensor.shape) for name, tensor in shapes.items()}
    torch.save(TIMM.to_theirs(zeros), tmp_path / "timm.pth")
    load_model(tmp_path / "timm.pth")
    assert "3 taken, as in the published vit_tiny, which has its width" in caplog.text


def test_published_sizes_need_no_heads_and_what_nobody_published_is_refused(tmp_path: Path) -> None:
    config = model_config(ModelSection(arch="vit_tiny", image_size=32, depth=12), 5)
    with torch.device("meta"):
        shapes = Transformer(config).state_dict()
    state = {name: torch.zeros(tensor.shape) for name, tensor in shapes.items()}
    torch.save(to_reference(state), tmp_path / "vit.pth")
    assert load_model(tmp_path / "vit.pth")[0].config == config
    mixed = initialise(replace(ALPHA, mixer="attention", depth=1), seed=0)
    with pytest.raises(WeightsError, match=r"no published code computes this model \(.*mixer attention, tokenwise odl"):
        export_reference(tmp_path / "mixed.pth", mixed.config, mixed.state_dict())
