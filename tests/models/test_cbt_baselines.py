"""The CRATE and the ToST that CBT's code compares with are computed as there; their checkpoints come in and go out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from crate_dist.config import ModelSection, RecipeError, load_recipe
from crate_dist.models.build import find_arch, initialise, model_config
from crate_dist.models.config import ModelConfig
from crate_dist.models.transformer import Transformer
from crate_dist.models.weights.card import model_card
from crate_dist.models.weights.families import family_of, family_that_computes
from crate_dist.models.weights.families.cbt import CRATE, TOST
from crate_dist.models.weights.files import describe
from crate_dist.models.weights.names import WeightsError
from crate_dist.models.weights.read import load_model
from crate_dist.models.weights.write import export_model, export_reference

GOLDEN = Path(__file__).parents[1] / "golden" / "cbsa_baselines_parity.pt"
OF = {"mssa": ("cbsa_crate_tiny", CRATE), "tssa": ("cbsa_tost_tiny", TOST)}


@pytest.fixture(params=OF)
def mixer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def golden(mixer: str) -> dict[str, Any]:
    return dict(torch.load(GOLDEN, weights_only=True)[mixer])


@pytest.fixture
def checkpoint(mixer: str, golden: dict[str, Any], tmp_path: Path) -> Path:
    """What the published training code saves: names as DataParallel has them, and the name of an architecture."""
    path = tmp_path / "model_best.pth.tar"
    weights = {f"module.{name}": tensor for name, tensor in golden["state_dict"].items()}
    arch = {"mssa": "CRATE_tiny", "tssa": "ToST_tiny"}[mixer]
    torch.save({"epoch": 150, "arch": arch, "best_acc1": torch.tensor(60.0), "state_dict": weights}, path)
    return path


def expected(mixer: str) -> ModelConfig:
    numbers = {"image_size": 24, "patch_size": 8, "width": 16, "depth": 2, "heads": 2}
    return model_config(ModelSection(arch=OF[mixer][0], **numbers), num_classes=5)


def heads_of(mixer: str) -> int | None:
    """Returns what has to be said: of TSSA the temperatures tell it."""
    return 2 if mixer == "mssa" else None


def test_logits_and_gradients_are_the_published_codes_in_evaluation_and_training(
    mixer: str, golden: dict[str, Any], checkpoint: Path
) -> None:
    model, _ = load_model(checkpoint, heads_of(mixer))
    assert model.config == expected(mixer)
    for mode in ("eval", "train"):
        model.train(mode == "train").zero_grad()
        logits = model(golden["images"])
        assert (logits - golden[mode]["logits"]).abs().max() < 1e-5
        F.cross_entropy(logits, golden["labels"], label_smoothing=0.1).backward()
        theirs = OF[mixer][1].to_ours(golden[mode]["grads"])
        ours = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert ours.keys() == theirs.keys()  # so that nothing learns which does not there, such as a bias
        for name, gradient in ours.items():
            assert gradient is not None
            assert (gradient - theirs[name]).norm() < 1e-4 * theirs[name].norm(), (mode, name)


def test_checkpoints_go_out_as_they_came_and_tell_the_heads_then(
    mixer: str, golden: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    model, meta = load_model(checkpoint, heads_of(mixer))
    assert meta["resize_filter"] == "bilinear"
    written = tmp_path / "written.pth.tar"
    export_reference(written, model.config, model.state_dict(), meta)
    content = torch.load(written, weights_only=True)
    assert content["state_dict"].keys() == {f"module.{name}" for name in golden["state_dict"]}
    for name, tensor in golden["state_dict"].items():
        assert torch.equal(content["state_dict"][f"module.{name}"], tensor), name
    assert content.keys() >= {"epoch", "best_acc1", "optimizer", "scheduler"}  # which --resume reads
    assert load_model(written)[0].config == model.config
    export_model(tmp_path / "ours.pt", model.config, model.state_dict())
    assert load_model(tmp_path / "ours.pt")[0].config == model.config
    assert family_of(model.state_dict()) == (OF[mixer][1], False)


@pytest.mark.parametrize(
    ("arch", "parameters", "tensors"),
    [
        ("cbsa_crate_tiny", 1_789_120, 126),
        ("cbsa_crate_small", 6_666_904, 126),
        ("cbsa_tost_tiny", 1_789_156, 138),
        ("cbsa_tost_small", 6_666_976, 138),
    ],
)
def test_the_sizes_are_the_published_ones_whatever_a_file_says_of_its_architecture(
    arch: str, parameters: int, tensors: int, tmp_path: Path
) -> None:
    config = model_config(ModelSection(arch=arch), num_classes=1000)
    with torch.device("meta"):
        model = Transformer(config)
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == (parameters, tensors)
    family = family_that_computes(config)
    assert family is not None
    weights = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in model.state_dict().items()}
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({"arch": "CRATE_tiny", "state_dict": family.to_theirs(weights, "module.")}, path)
    assert find_arch(load_model(path)[0].config) == arch
    assert f"arch            {arch}\n" in describe(path)
    card = model_card("model.pt", config, {})
    assert card.startswith(f"# {arch}\n\nA [{family.name}](https://arxiv.org/abs/2509.16875) image classifier")
    assert card.count("@inproceedings{") == 2  # the code's paper, and the one of the mixer


def test_a_single_head_of_mssa_is_refused_both_ways_for_there_it_has_an_output_map(tmp_path: Path) -> None:
    golden = torch.load(GOLDEN, weights_only=True)["mssa"]
    torch.save(golden["state_dict"], tmp_path / "bare.pth")
    with pytest.raises(WeightsError, match=r"bare\.pth: .*output with a single head, too, and mssa has none here"):
        load_model(tmp_path / "bare.pth", heads=1)
    model = initialise(replace(expected("mssa"), heads=1), seed=0)
    with pytest.raises(WeightsError, match=r"no published code computes this model .*mixer mssa.* 1 heads"):
        export_reference(tmp_path / "out.pth", model.config, model.state_dict())


def test_the_bias_of_the_first_map_is_a_setting_of_the_mixers_that_may_have_one() -> None:
    section = load_recipe("cbt_tiny", ["model.arch=cbsa_tost_tiny"]).model
    for in_bias in (False, True):
        config = replace(model_config(section, 10), in_bias=in_bias)
        for mixer, name in (("tssa", "tssa.subspaces"), ("attention", "attention.qkv")):
            with torch.device("meta"):
                first = Transformer(replace(config, mixer=mixer)).layers[0].get_submodule(name)
            assert isinstance(first, nn.Linear)
            assert (first.bias is not None) == in_bias
    assert not model_config(section, 10).in_bias
    assert load_recipe("tost_tiny_12").model.parts().in_bias
    with pytest.raises(
        RecipeError,
        match=r"in_bias true would change nothing: no part of this model reads it, only mixer tssa, mixer attention",
    ):
        load_recipe("crate_tiny", ["model.in_bias=true"])
