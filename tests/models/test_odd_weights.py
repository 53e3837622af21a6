"""Files of others that are odd: they are read, or what they are is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from crate_dist.config import ModelSection, WeightsKind
from crate_dist.models.build import initialise, model_config
from crate_dist.models.config import ModelConfig
from crate_dist.models.transformer import Transformer
from crate_dist.models.weights.files import describe
from crate_dist.models.weights.names import WeightsError, from_reference, infer_config, to_reference
from crate_dist.models.weights.read import load_model, read_weights
from crate_dist.models.weights.write import export_model, export_reference

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = ModelConfig(image_size=16, patch_size=4, num_classes=7, dim=24, depth=2, heads=3)


@pytest.fixture
def state() -> dict[str, Tensor]:
    return dict(initialise(SMALL, seed=0).state_dict())


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("wrapped", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_the_names_of_a_compiled_model_are_those_of_the_model(
    tmp_path: Path, state: dict[str, Tensor], wrapped: str
) -> None:
    torch.save({"state_dict": to_reference(state, wrapped)}, tmp_path / "whole.pt")
    torch.save({name.replace(".0.", ".0._orig_mod."): tensor for name, tensor in state.items()}, tmp_path / "layer.pt")
    for name in ("whole.pt", "layer.pt"):
        assert_equal(dict(load_model(tmp_path / name, heads=3)[0].state_dict()), state)


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema", "ema", "module", "model_state_dict"])
def test_weights_under_the_keys_of_other_training_codes_are_read_and_an_average_alone_is_said(
    tmp_path: Path, state: dict[str, Tensor], key: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "weights.pt"
    torch.save({key: to_reference(state), "epoch": 3}, path)
    model, meta = load_model(path, heads=3)
    assert_equal(dict(model.state_dict()), state)
    assert (meta["epoch"], meta["resize_filter"]) == (3, "bilinear")
    assert "eval_fit" not in meta  # which fine-tuning codes' files have
    average = "module" not in key and "model_state" not in key
    assert (f"it holds the moving average of weights alone, {key}" in caplog.text) == average
    there: WeightsKind = "ema" if average else "raw"
    other: WeightsKind = "raw" if average else "ema"
    assert_equal(read_weights(path, weights=there).state_dict, state)
    with pytest.raises(WeightsError, match=f"'{other}' weights were asked for"):
        read_weights(path, weights=other)


def test_numbers_that_are_no_weights_are_refused_and_those_of_a_diverged_training_are_named(
    tmp_path: Path, state: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "weights.pt"
    torch.save(state | {"head.linear.weight": state["head.linear.weight"].to(torch.int8)}, path)
    with pytest.raises(WeightsError, match=r"'head\.linear\.weight' holds int8, no floating-point numbers"):
        load_model(path, heads=3)
    broken = state["layers.1.ista.dictionary"].clone()
    broken[0, 0] = float("inf")
    export_model(path, SMALL, state | {"layers.1.ista.dictionary": broken})
    load_model(path)
    said = "'layers.1.ista.dictionary' has values that are NaN or infinite"
    assert caplog.text.count(said) == 1
    assert said in describe(path)


def test_positions_of_no_square_grid_and_the_baselines_of_tost_s_code_are_named(tmp_path: Path) -> None:
    alpha = torch.load(GOLDEN / "crate_alpha_parity.pt", weights_only=True)["state_dict"]
    places = alpha["pos_embedding"].shape[1] + 2
    wide = alpha | {"pos_embedding": torch.zeros(1, places, alpha["pos_embedding"].shape[2])}
    with pytest.raises(WeightsError, match=f"has {places} places, {places - 1} of them for patches: no square grid"):
        infer_config(from_reference(wide), heads=4)
    names = ("cls_token", "blocks.0.attn.qkv.weight", "norm.weight", "cls_attn_blocks.0.norm1.weight")
    torch.save({"model": {name: torch.zeros(8, 8) for name in names}}, tmp_path / "xcit.pth")
    with pytest.raises(WeightsError, match=r"xcit\.pth: these are the weights of XCiT or ViT in ToST's code"):
        load_model(tmp_path / "xcit.pth")


@pytest.mark.parametrize(
    ("arch", "patch", "said"),
    [
        ("tost_tiny_12", 4, "its stem is for patches of 8 or 16 pixels, this model's are of 4"),
        ("cbt_base", 16, "what makes its cbt_base names an operator that is not defined there"),
        ("tost_tiny_12", 8, ""),
        ("cbsa_tost_tiny", 16, ""),
    ],
)
def test_what_the_published_code_has_the_parts_of_and_cannot_build_is_written_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, arch: str, patch: int, said: str
) -> None:
    config = model_config(ModelSection(arch=arch, image_size=32, patch_size=patch), num_classes=3)
    with torch.device("meta"):
        shapes = Transformer(config).state_dict()
    weights = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in shapes.items()}
    export_reference(tmp_path / "out.pth", config, weights)
    assert ("cannot build this model, nor evaluate the file" in caplog.text) == bool(said)
    assert said in caplog.text
    assert read_weights(tmp_path / "out.pth").architecture()[0] == config


def test_the_first_value_of_a_scale_goes_along_with_a_size_that_nobody_published(tmp_path: Path) -> None:
    section = ModelSection(arch="tost_tiny_24", width=16, depth=3, image_size=32, patch_size=8)
    config = model_config(section, num_classes=3)
    assert config.layer_scale == 1e-5
    export_reference(tmp_path / "out.pth", config, initialise(config, seed=0).state_dict())
    assert load_model(tmp_path / "out.pth")[0].config == config
