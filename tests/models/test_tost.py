"""ToST computes what its published code computes, and its published files come in and go out."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import pickle
from pathlib import Path
from typing import Any

import lion_pytorch
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import crate_dist
from crate_dist.config import ModelSection, RecipeError, load_recipe
from crate_dist.config.archs import ARCHS
from crate_dist.models.batch_norm import statistics, take_statistics
from crate_dist.models.build import find_arch, initialise, model_config
from crate_dist.models.config import ModelConfig
from crate_dist.models.heads.class_attention import ClassAttentionBlock, ClassAttentionHead
from crate_dist.models.mixers.tssa import TSSA
from crate_dist.models.positions import FourierPositions
from crate_dist.models.transformer import Transformer
from crate_dist.models.weights.__main__ import main
from crate_dist.models.weights.families.tost import FAMILY
from crate_dist.models.weights.files import describe
from crate_dist.models.weights.names import WeightsError, from_reference, to_reference
from crate_dist.models.weights.opening import Options, open_file
from crate_dist.models.weights.read import load_model, read_weights
from crate_dist.models.weights.write import export_model, export_reference

GOLDEN = Path(__file__).parents[1] / "golden" / "tost_parity.pt"
SMALL = ModelConfig(
    **dataclasses.asdict(dataclasses.replace(ARCHS["tost_tiny_12"], dim=64, depth=3, heads=4)),
    image_size=32,
    patch_size=8,
    num_classes=10,
)
PARAMETERS = {
    "tiny_12": "5.769",
    "small_12": "22.59",
    "tiny_24": "10.22",
    "small_24": "40.34",
    "medium_24": "71.48",
    "large_24": "160.3",
}
"""In millions, at 224 pixels, patch 16, 1,000 classes."""


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return torch.load(GOLDEN, weights_only=True)


@pytest.fixture
def model(golden: dict[str, Any]) -> Transformer:
    model = Transformer(SMALL)
    model.load_state_dict(from_reference(golden["state_dict"]))
    return model.eval()


def off(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def assert_gradients(model: Transformer, theirs: dict[str, Tensor]) -> None:
    expected = from_reference(theirs)
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        assert gradient is not None
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


def loss_of(model: Transformer, golden: dict[str, Any]) -> Tensor:
    return F.cross_entropy(model(golden["images"]), golden["labels"], label_smoothing=0.1)


@torch.no_grad()
def test_logits_and_all_on_the_way_equal_the_published_codes(model: Transformer, golden: dict[str, Any]) -> None:
    assert off(model(golden["images"]), golden["logits"]) < 1e-5
    seen = model.forward_intermediates(golden["images"])
    assert off(seen.logits, golden["logits"]) < 1e-5
    for layer, (w, z) in enumerate(zip(seen.projections, seen.features, strict=True)):
        mixer = seen.mixers[layer]
        assert isinstance(mixer, TSSA)
        assert off(z, golden["features"][layer]) < 1e-5
        assert off(mixer.membership(w), golden["membership"][layer]) < 1e-5
        assert off(mixer.gate(w), golden["channel_gate"][layer]) < 1e-5
    assert isinstance(model.head, ClassAttentionHead)
    z = model.head.begin(seen.features[-1])
    for number, block in enumerate(model.head.blocks):
        assert isinstance(block, ClassAttentionBlock)
        assert off(block.attention.attention(block.attention_norm(z)), golden["cls_attention"][number]) < 1e-5
        z = block(z)
        assert off(z, golden["cls_features"][number]) < 1e-5


def test_gradients_and_twelve_lion_steps_follow_the_published_code(model: Transformer, golden: dict[str, Any]) -> None:
    lion = golden["lion"]
    optimizer = lion_pytorch.Lion(
        model.parameters(), lr=lion["lr"], weight_decay=lion["weight_decay"], betas=tuple(lion["betas"])
    )
    losses: list[float] = []
    for _ in range(lion["steps"]):
        optimizer.zero_grad()
        loss = loss_of(model, golden)
        loss.backward()
        if not losses:
            assert_gradients(model, golden["grads"])
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(golden["lion_losses"], abs=1e-4)


def test_training_takes_batch_statistics_as_the_published_code(model: Transformer, golden: dict[str, Any]) -> None:
    expected = golden["train_mode"]
    model.train()
    loss = loss_of(model, golden)
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-5)
    assert_gradients(model, expected["grads"])
    take_statistics(model, statistics(model))
    state = model.state_dict()
    for name, buffer in FAMILY.to_ours(expected["buffers_after"]).items():
        assert off(state[name].double(), buffer.double()) < 1e-6, name


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_bf16_is_near_to_fp32_with_statistics_over_tokens_in_fp32(
    model: Transformer, golden: dict[str, Any], precision: str
) -> None:
    images = golden["images"]
    model.set_execution(autocast=precision == "autocast", recompute=1)
    if precision == "bf16":
        model, images = model.bfloat16(), images.bfloat16()
    logits = model(images)
    logits.float().sum().backward()
    assert off(logits.float(), golden["logits"]) < 0.1
    mixer = model.layers[0].get_submodule("tssa")
    assert isinstance(mixer, TSSA)
    w = torch.randn(2, 4, 50, 16).bfloat16()
    assert mixer.membership(w).dtype == mixer.gate(w).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_files_of_any_precision_compute_with_fp32_statistics(
    golden: dict[str, Any], tmp_path: Path, dtype: torch.dtype
) -> None:
    theirs, ours = tmp_path / "theirs.pth", tmp_path / "ours.pt"
    weights = {name: tensor.to(dtype) for name, tensor in golden["state_dict"].items()}  # and counts
    torch.save({"model": weights, "args": argparse.Namespace(input_size=32)}, theirs)
    main(["convert", str(theirs), str(ours), "--to", "crate-dist"])
    for path in (theirs, ours):
        found, _ = load_model(path)
        norm = found.patch_embed.norms[0]
        assert {buffer.dtype for name, buffer in norm.named_buffers() if name != "num_batches_tracked"} == {
            torch.float32
        }
        assert norm.num_batches_tracked.dtype == torch.int64
        assert {parameter.dtype for parameter in found.parameters()} == {dtype}
        assert off(found.eval()(golden["images"].to(dtype)).float(), golden["logits"]) < 0.1
        assert off(crate_dist.load(path)(golden["images"]), golden["logits"]) < 0.1


def test_every_size_has_the_published_parameters() -> None:
    sizes = {arch.removeprefix("tost_"): arch for arch in ARCHS if arch.startswith("tost_")}
    assert sizes.keys() == PARAMETERS.keys()
    for size, arch in sizes.items():
        config = model_config(ModelSection(arch=arch), 1000)
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in Transformer(config).parameters())
        assert f"{parameters / 1e6:.4g}" == PARAMETERS[size]
        assert find_arch(config) == arch


def test_positions_are_a_function_of_the_grid_and_no_state(model: Transformer) -> None:
    positions = model.positions
    assert isinstance(positions, FourierPositions)
    assert not [name for name in model.state_dict() if "features" in name]
    wide = positions((2, 3))
    assert wide.shape == (1, 6, 64)
    built_for_it = FourierPositions(64, (2, 3))
    built_for_it.load_state_dict(positions.state_dict())
    assert torch.equal(built_for_it((2, 3)), wide)
    with torch.no_grad():
        assert model.forward_intermediates(torch.randn(1, 3, 16, 48)).grid == (2, 6)


def test_patches_that_no_stem_of_convolutions_has_are_refused_with_those_that_would_do() -> None:
    with pytest.raises(ValueError, match="patch_size is one of 4, 8, 16, not 2"):
        dataclasses.replace(SMALL, patch_size=2)
    with pytest.raises(ValueError, match="60 / 8 for patches of 16 pixels; 56 would divide"):
        dataclasses.replace(SMALL, patch_size=16, dim=60)
    with pytest.raises(RecipeError, match="patch_size is one of 4, 8, 16, not 32"):
        load_recipe(Path("configs/crate_base.toml"), ["model.arch=tost_tiny_12", "model.patch_size=32"])


def test_first_weights_have_the_published_distribution() -> None:
    state = initialise(dataclasses.replace(SMALL, dim=256, heads=8, num_classes=50), seed=0).state_dict()
    for name in ("layers.0.tssa.subspaces", "layers.1.mlp.hidden", "head.blocks.0.attention.qkv", "head.linear"):
        assert state[f"{name}.weight"].std().item() == pytest.approx(0.02, rel=0.05)
        assert not state[f"{name}.bias"].any()
    assert state["head.cls_token"].std().item() == pytest.approx(0.02, rel=0.2)
    assert state["positions.proj.weight"].abs().max().item() == pytest.approx(1 / 8, rel=0.01)  # a convolution's own
    assert torch.equal(state["layers.0.tssa.temperature"], torch.ones(8, 1))
    assert torch.equal(state["layers.2.mlp_scale"], torch.ones(256))
    deep = model_config(ModelSection(arch="tost_tiny_24"), 10)
    assert deep.layer_scale == 1e-5


def _checkpoint(golden: dict[str, Any], **other: Any) -> dict[str, Any]:
    """Returns what ToST's main.py saves: Namespace, moments and an average, here of weights that are one more."""
    weights = golden["state_dict"]
    options = {
        "model": "tost_cab_tiny_12_p8",
        "input_size": 32,
        "opt_betas": None,
        "lr": 1e-3,
        "model_ema_decay": 0.99996,
    }
    return {
        "model": weights,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "lr_scheduler": {"base_values": [1e-3], "t_initial": 400, "noise_range_t": None},
        "epoch": 399,
        "model_ema": {name: tensor + 1 for name, tensor in weights.items()},
        "scaler": {"scale": 65536.0, "_growth_tracker": 7},
        "args": argparse.Namespace(**options, distributed=True, betas=(0.9, 0.999)),
    } | other


def test_a_published_checkpoint_is_read_with_the_options_of_its_command(
    golden: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "best_model.pth"
    torch.save(_checkpoint(golden), path)
    model, meta = load_model(path)
    assert model.config == SMALL
    assert (meta["arch"], meta["epoch"]) == ("tost_cab_tiny_12_p8", 399)
    assert "model_ema; --weights ema would take that" in caplog.text
    with torch.no_grad():
        assert off(model.eval()(golden["images"]), golden["logits"]) < 1e-5
    averaged = read_weights(path, weights="ema")
    assert torch.equal(averaged.state_dict["head.cls_token"], golden["state_dict"]["cls_token"] + 1)
    assert averaged.meta["ema_decay"] == 0.99996
    assert not read_weights(path, weights="raw").notes
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f" {parameters:,}\n" in describe(path)  # running statistics are none


@pytest.mark.parametrize(
    ("content", "stretched", "said"),
    [
        (("model", "optimizer", "scaler"), True, 'by a "scaler" and neither "epoch" nor "args" in it'),  # finetune.py's
        (("net", "acc", "epoch"), True, 'by "acc" beside "net"'),  # which finetune.py --resume reads
        (("model", "epoch", "args", "scaler"), False, ""),  # main.py's
        (("model", "epoch", "args"), False, ""),  # main.py's best_model.pth
        (("model_ema", "epoch", "args"), False, "it holds the moving average of weights alone"),  # of main.py's
        (("model",), False, "nothing in it says whether it was fine-tuned"),
        (("state_dict", "epoch"), False, "nothing in it says whether it was fine-tuned"),
        (("net",), False, "nothing in it says whether it was fine-tuned"),
    ],
)
def test_images_are_prepared_as_the_code_does_that_wrote_the_file(
    golden: dict[str, Any], tmp_path: Path, content: tuple[str, ...], stretched: bool, said: str
) -> None:
    weights = {f"module.{name}": tensor for name, tensor in golden["state_dict"].items()}
    beside = _checkpoint(golden) | {"acc": 97.5}
    names = ("model", "state_dict", "net")
    torch.save({key: weights if key in names else beside[key] for key in content}, tmp_path / "tost.t7")
    found = read_weights(tmp_path / "tost.t7")
    prepared = {key: found.meta[key] for key in ("eval_fit", "resize_filter") if key in found.meta}
    assert prepared == ({"eval_fit": "stretch", "resize_filter": "bilinear"} if stretched else {})
    assert found.kind == ("reference fine-tuning" if stretched else "reference")
    assert said in " ".join(found.notes)
    assert len(found.notes) == bool(said)


def test_the_whole_centre_is_evaluated_where_the_options_say_so(golden: dict[str, Any], tmp_path: Path) -> None:
    torch.save(_checkpoint(golden, args=argparse.Namespace(full_crop=True)), tmp_path / "full.pth")
    assert read_weights(tmp_path / "full.pth").meta["eval_crop"] == 1.0


def test_the_average_is_converted_when_asked_for_and_missed_when_not_there(
    golden: dict[str, Any], tmp_path: Path
) -> None:
    path, out = tmp_path / "checkpoint.pth", tmp_path / "average.pt"
    torch.save(_checkpoint(golden), path)
    main(["convert", str(path), str(out), "--to", "crate-dist", "--weights", "ema"])
    assert torch.equal(load_model(out)[0].state_dict()["head.cls_token"], golden["state_dict"]["cls_token"] + 1)
    torch.save(golden["state_dict"], path)
    with pytest.raises(WeightsError, match="'ema' weights were asked for"):
        read_weights(path, weights="ema")


def test_what_is_written_has_the_published_names_and_order_and_comes_back(
    golden: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = from_reference(golden["state_dict"])
    path = tmp_path / "tost.pth"
    export_reference(path, SMALL, state, {"epoch": 7})
    written = torch.load(path, weights_only=True)
    assert written["model"].keys() == golden["state_dict"].keys()  # as --pretrained loads it, with strict=True
    for name, tensor in written["model"].items():
        assert tensor.dtype == golden["state_dict"][name].dtype
        assert torch.equal(tensor, golden["state_dict"][name]), name
    assert "optimizer" not in written
    with caplog.at_level(logging.WARNING):
        model, _ = load_model(path)
    assert not caplog.text
    assert model.config == SMALL
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert to_reference(state).keys() == golden["state_dict"].keys()
    export_model(tmp_path / "ours.pt", SMALL, state)
    assert load_model(tmp_path / "ours.pt")[0].config == SMALL


class _Hostile:
    """Pickled as whatever call it is given."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


def _begun(path: Path) -> None:
    path.touch()


def test_a_hostile_namespace_runs_nothing_and_reaches_no_attribute(golden: dict[str, Any], tmp_path: Path) -> None:
    path, trace = tmp_path / "hostile.pth", tmp_path / "trace"
    call = _Hostile(_begun, (trace,))
    refused = [
        _checkpoint(golden, args=call),
        _checkpoint(golden, args=argparse.Namespace(model=call)),
        _checkpoint(golden, args=_Hostile(argparse.Namespace, (1, 2))),
        _checkpoint(golden, args=_Hostile(getattr, (argparse.Namespace(), "__init__"))),
        _checkpoint(golden, args=argparse.Namespace(output=tmp_path)),
    ]
    for content in refused:
        torch.save(content, path)
        with pytest.raises(WeightsError):
            read_weights(path)
        assert not trace.exists()
    names = ("__setstate__", "__class__", "__dict__", "values")
    inert = [
        _Hostile(argparse.Namespace, (), dict.fromkeys(names, 3) | {"model": [1], "input_size": -5}),
        _Hostile(argparse.Namespace, (), {"input_size": "x" * 10, 5: 6, "model": {"a": 1}}),
        _Hostile(argparse.Namespace, (), ({"a": 1}, {"values": 2, "__class__": 3})),
        _Hostile(argparse.Namespace, (), [1, 2]),
    ]
    for options in inert:
        torch.save(_checkpoint(golden, args=options), path)
        found = open_file(path)["args"]
        assert type(found) is Options
        assert not hasattr(found, "__dict__")
        assert isinstance(found.values, dict)
        assert all(isinstance(value, int | str) for value in found.values.values())
        assert read_weights(path).architecture()[0].image_size == 224  # nothing there could be a size
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    torch.save(_checkpoint(golden, args=argparse.Namespace(input_size=10**9)), path)
    with pytest.raises(WeightsError, match=r"images of 1,000,000,000 pixels"):
        load_model(path)
