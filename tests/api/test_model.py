"""`crate_dist.load`: whatever was trained opens as one module, which prepares pictures as its evaluation did."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import crate_dist
from crate_dist.checkpoint.format import CheckpointError
from crate_dist.config import RecipeError, load_recipe
from crate_dist.models.build import build_model
from crate_dist.models.weights.names import WeightsError
from crate_dist.models.weights.write import export_model, export_reference, export_safetensors
from crate_dist.whitebox.maps import token_maps
from tests.data_prep import picture
from tests.ranks import REPOSITORY

STORED = REPOSITORY / "tests" / "stored_run"
CHECKPOINT = STORED / "run" / "checkpoints" / "step-00000008"
CLASSES = ("c0", "c1", "c2")


@pytest.fixture(scope="module")
def model() -> crate_dist.Model:
    return crate_dist.load(STORED / "run")


def test_the_package_is_light_until_something_is_asked_of_it() -> None:
    code = "import crate_dist, sys; crate_dist.fit; dir(crate_dist); assert not {'torch', 'deepspeed'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
    assert {"load", "Shards", "fit"} <= set(dir(crate_dist))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        getattr(crate_dist, "lode")  # noqa: B009  mypy would not let it pass


def test_a_run_is_its_newest_checkpoint(model: crate_dist.Model) -> None:
    images = torch.randn(2, 3, 8, 8)
    assert not model.training
    assert (model.classes, model.class_names, model.name) == (CLASSES, CLASSES, str(CHECKPOINT))
    assert model.recipe == load_recipe(STORED / "run" / "recipe.toml")
    again = crate_dist.load(str(CHECKPOINT))
    torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)


def test_an_export_knows_what_its_run_knew() -> None:
    model = crate_dist.load(STORED / "model-best.pt")
    recipe = load_recipe(STORED / "run" / "recipe.toml")
    assert model.classes == CLASSES
    assert model.recipe is not None
    assert model.recipe.deciding_values() == recipe.deciding_values()
    assert model.preprocess == crate_dist.load(STORED / "run").preprocess


def test_names_for_people_travel_with_the_weights(model: crate_dist.Model, tmp_path: Path) -> None:
    about = {"classes": ["n0", "n1", "n2"], "class_names": ["cat", "dog", "eel"], "recipe": "x", "recipe_values": {}}
    export_model(tmp_path / "a.pt", model.config, model.state_dict(), about)
    export_safetensors(tmp_path / "a.safetensors", model.config, model.state_dict(), about)
    export_reference(tmp_path / "a.pth.tar", model.config, model.state_dict(), about)
    for file in sorted(tmp_path.iterdir()):
        found = crate_dist.load(file)
        assert (found.classes, found.class_names) == (("n0", "n1", "n2"), ("cat", "dog", "eel")), file
        assert found.recipe is None, "values that make no recipe"
        assert {name for name, _ in found.predict(picture(1, (9, 9)), top=9)} == {"cat", "dog", "eel"}


def test_a_file_of_the_published_code_opens_and_says_what_it_does_not_know() -> None:
    model = crate_dist.load(REPOSITORY / "tests" / "golden" / "crate_reference_checkpoint.pth.tar", heads=3)
    assert (model.classes, model.class_names, model.recipe) == (None, None, None)
    size = model.config.image_size
    (name, share), *_ = model.predict(np.zeros((size, size, 3), dtype=np.uint8))
    assert name.isdecimal()
    assert 0 < share <= 1


def test_its_accuracy_on_shards_is_what_evaluation_measured(model: crate_dist.Model) -> None:
    val = crate_dist.Shards(STORED / "shards" / "val", transform=model.preprocess)
    ((images, labels),) = torch.utils.data.DataLoader(val, batch_size=len(val))
    measured = json.loads((STORED / "evaluations.json").read_text())["run"]
    with torch.inference_mode():
        logits = model(images)
    assert 100 * (logits.argmax(dim=1) == labels).double().mean().item() == pytest.approx(measured["top1"])
    assert torch.nn.functional.cross_entropy(logits, labels).item() == pytest.approx(measured["loss"], rel=1e-4)


def test_every_form_of_a_picture_gives_the_same_input(model: crate_dist.Model, tmp_path: Path) -> None:
    data = picture(3, (40, 30), format="PNG")
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    (tmp_path / "a.png").write_bytes(data)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    expected = model.preprocess(data)
    assert expected.shape == (3, 8, 8)
    forms: list[Any] = [Image.open(io.BytesIO(data)), pixels, tensor, tmp_path / "a.png", str(tmp_path / "a.png")]
    grey = Image.fromarray(pixels[..., 0])
    flat = torch.from_numpy(pixels[..., 0].copy())
    assert torch.equal(model.preprocess(flat), model.preprocess(grey))
    for form in forms:
        torch.testing.assert_close(model.preprocess(form), expected, rtol=0, atol=0)
    assert torch.equal(model.preprocess(forms), expected.expand(len(forms), -1, -1, -1))
    assert torch.equal(model.preprocess(pixels[None]), expected[None])
    shown = model.preprocess.pixels(expected)
    assert (shown.shape, shown.dtype) == ((8, 8, 3), np.uint8)
    np.testing.assert_array_equal(model.preprocess.pixels(model.preprocess(shown)), shown)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (np.zeros((8, 8, 3), dtype=np.float32), TypeError, r"not ndarray of float32 and shape \(8, 8, 3\).*times 255"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), TypeError, r"shape \(8, 8, 3\).*tensor \(3, height, width\)"),
        (Image.new("F", (8, 8), 0.5), TypeError, "mode F does not tell which of its values are black and white"),
        (Image.new("I", (8, 8), 255), TypeError, "mode I does not tell"),
        (7, TypeError, "not int"),
        (b"GIF", ValueError, "not an image of a known format"),
        (__file__, ValueError, "test_model.py: not an image"),
    ],
)
def test_what_is_no_picture_is_told_what_would_be(
    model: crate_dist.Model, given: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        model.preprocess(given)


def test_one_image_goes_in_and_comes_out_without_an_axis_of_batches(model: crate_dist.Model) -> None:
    images = torch.randn(2, 3, 8, 8)
    both, one = model.intermediates(images), model.intermediates(images[0])
    torch.testing.assert_close(one.logits, both.logits[0])
    torch.testing.assert_close(model(images[0]), both.logits[0])
    assert one.attention(-1).shape == both.attention(-1).shape[1:]
    torch.testing.assert_close(one.class_attention(1), both.class_attention(1)[0])


def test_attention_of_the_class_token_lies_on_the_grid_of_patches(model: crate_dist.Model) -> None:
    """At another resolution too, and not of a square."""
    image = torch.randn(1, 3, 12, 20)
    inside = model.intermediates(image)
    assert inside.grid == (3, 5)
    maps = torch.stack([inside.class_attention(layer) for layer in range(model.config.depth)])
    torch.testing.assert_close(maps.flatten(-2), torch.stack([inside.attention(n)[..., 0, 1:] for n in range(4)]))
    torch.testing.assert_close(token_maps(model, image).layers, maps)


def test_it_goes_where_a_module_goes(model: crate_dist.Model, tmp_path: Path) -> None:
    images = torch.randn(1, 3, 8, 8)
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(images), model(images))
    assert copied.preprocess == model.preprocess
    plain = build_model(load_recipe(STORED / "run" / "recipe.toml").model, 3, seed=1)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(images), model(images))
    assert model.to(torch.float64).predict(picture(1, (9, 9)))
    model.float()


def test_a_new_head_and_another_resolution_keep_all_the_rest(model: crate_dist.Model) -> None:
    new = crate_dist.load(STORED / "run", classes=["cat", "dog"], image_size=16)
    assert new.classes == new.class_names == ("cat", "dog")
    assert new(new.preprocess(picture(1, (40, 30)))).shape == (2,)
    assert new.preprocess == dataclasses.replace(model.preprocess, size=16)
    assert torch.equal(new.layers.state_dict()["3.ista.dictionary"], model.layers.state_dict()["3.ista.dictionary"])
    new(torch.randn(1, 3, 16, 16)).sum().backward()
    assert new.head.linear.weight.grad is not None
    assert crate_dist.load(STORED / "run", image_size=16).classes == CLASSES
    assert crate_dist.load(STORED / "run", classes=np.int64(5))(torch.randn(3, 8, 8)).shape == (5,)
    wrong: Any
    for wrong, words in (
        ({"image_size": 18}, "image_size=18 is no whole number of the model's patches of 4 pixels; 16 or 20 would be"),
        ({"classes": "cats"}, "a list of names such as \\['cats'\\], not a text"),
        ({"classes": []}, "at least one class"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            crate_dist.load(STORED / "run", **wrong)


def test_two_classes_of_one_name_are_told_apart() -> None:
    model = crate_dist.load(STORED / "run")
    model.class_names = ("crane", "crane", "bird")
    assert {name for name, _ in model.predict(picture(1, (9, 9)))} == {"crane (c0)", "crane (c1)", "bird"}


def test_a_model_of_a_recipe_begins_as_its_run_does() -> None:
    model, recipe = crate_dist.create("demo", classes=10), load_recipe("demo")
    first = build_model(recipe.model, 10, recipe.train.seed).state_dict()
    assert all(torch.equal(tensor, first[name]) for name, tensor in model.state_dict().items())
    assert crate_dist.create(recipe, classes=list("ab")).classes == ("a", "b")
    with pytest.raises(RecipeError, match="crate_tiny"):
        crate_dist.create("crate_teeny", classes=10)


TAKES = r"load takes a run folder.*a checkpoint in one.*a file of weights"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("nowhere/nothing", f"nothing at nowhere/nothing; {TAKES}"),
        (STORED / "runn", rf"the runs in \S+stored_run are run; {TAKES}"),
        ("crate_tiny", rf'crate_dist.create\("crate_tiny", classes=…\).*{TAKES}'),
        (
            "https://host/model-best.pt",
            f"https://host/model-best.pt is no file on this machine: fetch it first; {TAKES}",
        ),
        ({"weights": 1}, f"not a dict: {TAKES}"),
        (STORED.parent, "neither a run nor a checkpoint.*the runs in it are stored_run: give one of them"),
        (STORED / "shards", "neither a run nor a checkpoint.*a file of weights would do"),
        (__file__, rf"test_model.py is no PyTorch checkpoint.*{TAKES}"),
    ],
)
def test_what_cannot_be_loaded_is_told_what_can(wrong: Any, words: str) -> None:
    with pytest.raises((CheckpointError, WeightsError), match=words):
        crate_dist.load(wrong)
