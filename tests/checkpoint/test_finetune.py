"""Fine-tuning: the same trainer, begun from weights that are found on all ranks or on none."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from crate_dist.checkpoint.finetune import Origin, begin_from, weights_digest
from crate_dist.config import ModelSection, RecipeError, load_recipe
from crate_dist.data.augment import RandAugment, augmentations
from crate_dist.launching.options import recipe_from, recipe_parser
from crate_dist.launching.preflight import preflight
from crate_dist.models.build import build_model
from crate_dist.models.positions import interpolate_positions
from crate_dist.models.weights.names import to_reference
from crate_dist.models.weights.write import export_model, export_reference
from crate_dist.run.folder import RunFolder
from crate_dist.world import World
from tests.conftest import SMALL_RECIPE, casts, write_split
from tests.ranks import REPOSITORY, spawn, train_to_the_end

SECTION = ModelSection(arch="crate_demo", image_size=32, patch_size=8)
UNPUBLISHED = Path(__file__).parents[1] / "golden" / "crate_reference_checkpoint.pth.tar"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, cast_shards: Path) -> Path:
    """The folder of a short run on four classes at 32 x 32 pixels."""
    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "small.toml").write_text(SMALL_RECIPE)
    arguments = ["--config", folder / "small.toml", "--data", cast_shards, "--run-dir", folder / "run"]
    train_to_the_end([*arguments, "--set", "train.max_steps=3", "--set", "data.val_split="], world_size=1)
    return folder / "run"


@pytest.fixture(scope="module")
def three_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards without green."""

    def samples() -> Iterator[tuple[str, bytes, int]]:
        for key, image, label in casts(80, seed=6):
            if label != 3:
                yield key, image, label

    root = tmp_path_factory.mktemp("three")
    write_split(root / "train", samples(), shard_samples=30, classes=3)
    return root


def arguments(data: Path, recipe: Path, run: Path, *more: str) -> list[object]:
    overrides = ["model.image_size=48", "data.val_split=", "augment.randaugment_ops=2", "augment.erase=0.25", *more]
    sets = [word for override in overrides for word in ("--set", override)]
    return ["--config", recipe, "--data", data, "--run-dir", run, *sets]


@pytest.mark.spawn
def test_a_run_begins_from_another_s_weights_and_once_it_has_begun_does_without_them(
    pretrained: Path, three_classes: Path, small_recipe: Path, tmp_path: Path
) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    shutil.copytree(pretrained, source)
    # Steps too small to be seen, so that the weights are still those that it began from.
    overrides = ["model.image_size=48", "data.val_split=", "augment.randaugment_ops=2", "augment.erase=0.25"]
    overrides += ["train.precision=fp32", "optim.lr=1e-30", "optim.weight_decay=0"]
    command: list[object] = ["--config", small_recipe, "--data", three_classes, "--run-dir", run, "--init-from", source]
    command += [word for override in overrides for word in ("--set", override)]
    output = train_to_the_end([*command, "--set", "train.max_steps=1"], world_size=2)
    assert "positions interpolated from 4 x 4 to 6 x 6 patches; head new, 4 classes there and 3 here" in output
    there = torch.load(source / "model-last.pt", weights_only=True)["state_dict"]
    here = torch.load(run / "model-last.pt", weights_only=True)["state_dict"]
    new = build_model(SECTION.model_copy(update={"image_size": 48}), 3, seed=0).state_dict()
    expected = {name: new[name] if name.startswith("head.") else there[name] for name in there}
    expected["pos_embedding"] = interpolate_positions(there["pos_embedding"], (6, 6))
    assert here.keys() == expected.keys()
    for name, tensor in here.items():
        assert torch.allclose(tensor, expected[name], rtol=0, atol=1e-20), name
    origin = json.loads(RunFolder(run).record_file.read_text())["began_from"]
    assert origin["weights"] == str(source / "checkpoints" / "step-00000003")
    assert origin["sha256"] == weights_digest(there)

    shutil.rmtree(source)
    assert "resumed from" in train_to_the_end([*command, "--set", "train.max_steps=3"], world_size=1)
    lines = [json.loads(text) for text in RunFolder(run).metrics.read_text().splitlines()]
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == [1, 2, 3]
    assert json.loads(RunFolder(run).record_file.read_text())["began_from"] == origin
    other = load_recipe(RunFolder(run).recipe_file, [f"train.init_from={tmp_path}/other.pt"])
    with pytest.raises(RecipeError, match=r"train\.init_from"):  # another beginning would be another run
        RunFolder(run).check(other)


def begin_on_ranks(
    world: World, device: torch.device, sources: list[Path], classes: list[str], head: Any, heads: int | None = None
) -> tuple[Origin, str] | str:
    model = build_model(SECTION, len(classes), seed=1)
    try:
        origin = begin_from(sources[world.rank], model, classes, head, heads)
    except RecipeError as error:
        return str(error)
    return origin, weights_digest(model.state_dict())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights, as three files; and others."""
    folder = tmp_path_factory.mktemp("files")
    model, other = (build_model(SECTION, 4, seed=seed) for seed in (7, 8))
    paths = {name: folder / f"{name}.pt" for name in ("export", "unnamed", "reference", "other", "text")}
    export_model(paths["export"], model.config, model.state_dict(), {"classes": ["a", "b", "c", "d"]})
    export_model(paths["unnamed"], model.config, model.state_dict())
    export_reference(paths["reference"], model.config, model.state_dict())
    export_model(paths["other"], other.config, other.state_dict())
    paths["text"].write_text("not weights")
    return paths | {"unpublished": UNPUBLISHED}


# What each kind of file leads to where its classes are a, b, c, d or were never told.


@pytest.mark.parametrize(
    ("name", "classes", "head", "expected"),
    [
        ("export", "abcd", "auto", "kept"),
        ("export", "abcx", "auto", "new"),
        ("export", "abcx", "keep", "kept"),
        ("export", "abcd", "new", "new"),
        ("unnamed", "abcx", "auto", "kept"),
        ("reference", "abcd", "auto", "kept"),
        ("reference", "abc", "auto", "new"),
    ],
)
def test_the_head_is_new_where_the_classes_are_others(
    files: dict[str, Path], alone: World, name: str, classes: str, head: str, expected: str
) -> None:
    result = begin_on_ranks(alone, torch.device("cpu"), [files[name]], list(classes), head)
    assert isinstance(result, tuple), result
    origin, digest = result
    assert (digest == origin.sha256) == (expected == "kept")
    assert any("head new" in change for change in origin.changes) == (expected == "new")


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        ("0123", "0123", "head kept by number for 4 classes, which have numbers for names there"),
        (None, "0123", "head kept by number for 4 classes, the names of which it does not tell"),
        ("abcd", "abcd", ""),
        ("abcd", "0123", "head new"),
        ("0123", "abcd", "head new"),
    ],
)
def test_a_head_that_is_kept_without_knowing_the_classes_is_said(
    alone: World, tmp_path: Path, there: str | None, here: str, said: str
) -> None:
    model = build_model(SECTION, 4, seed=7)
    meta = {"classes": list(there)} if there else {}
    export_model(tmp_path / "model.pt", model.config, model.state_dict(), meta)
    result = begin_on_ranks(alone, torch.device("cpu"), [tmp_path / "model.pt"], list(here), "auto")
    assert isinstance(result, tuple), result
    assert said in "; ".join(result[0].changes)
    assert bool(result[0].changes) == bool(said)


@pytest.mark.parametrize(
    ("name", "head", "expected"),
    [
        ("text", "auto", "no PyTorch checkpoint"),
        ("unpublished", "auto", "no published CRATE has width 48 and depth 3"),
        ("export", "keep", "4 classes.*3"),
    ],
)
def test_weights_that_cannot_be_used_are_named(
    files: dict[str, Path], alone: World, name: str, head: str, expected: str
) -> None:
    result = begin_on_ranks(alone, torch.device("cpu"), [files[name]], ["a", "b", "c"], head)
    assert isinstance(result, str)
    assert str(files[name]) in result
    assert re.search(expected, result)


def test_heads_of_the_weights_to_begin_from_are_taken_from_the_command_line(
    alone: World, tmp_path: Path, small_recipe: Path
) -> None:
    torch.save(to_reference(build_model(SECTION, 4, seed=7).state_dict()), tmp_path / "bare.pth")
    for heads, expected in ((None, "--heads"), (2, "2 heads")):
        result = begin_on_ranks(alone, torch.device("cpu"), [tmp_path / "bare.pth"], list("abcd"), "auto", heads)
        assert isinstance(result, str)
        assert expected in result
    assert isinstance(
        begin_on_ranks(alone, torch.device("cpu"), [tmp_path / "bare.pth"], list("abcd"), "auto", 4), tuple
    )
    parser = recipe_parser(None)
    line = ["--config", str(small_recipe), "--data", str(tmp_path), "--init-from", "bare.pth", "--heads", "4"]
    assert recipe_from(parser.parse_args(line)).train.init_heads == 4


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[World]:
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield World(0, 1, 0, 1, "127.0.0.1", 0, "test")
    torch.distributed.destroy_process_group()


def begin_three_times(world: World, device: torch.device, cases: list[list[Path]]) -> list[Any]:
    return [begin_on_ranks(world, device, sources, list("abcd"), "auto") for sources in cases]


@pytest.mark.spawn
def test_ranks_begin_from_the_same_weights_or_not_at_all(files: dict[str, Path], tmp_path: Path) -> None:
    cases = [[files["export"], files[other]] for other in ("reference", "other")] + [[files["export"], tmp_path / "no"]]
    same, different, gone = zip(*spawn(begin_three_times, 2, cases), strict=True)
    assert same[0][1] == same[1][1]
    assert all("different weights" in message for message in different)
    assert all(f"cannot read {tmp_path / 'no'}" in message for message in gone)


def test_a_launcher_says_at_once_what_it_cannot_begin_from(
    pretrained: Path, three_classes: Path, small_recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    overrides = [f"data.root={three_classes}", "data.val_split="]
    for source, change, expected in (
        (tmp_path / "gone.pt", "model.image_size=48", "there is nothing"),
        (tmp_path / "folder", "model.image_size=48", "neither a run"),
        (pretrained, "model.arch=crate_tiny", "--set model.arch=crate_demo"),
        (pretrained, "model.depth=2", "crate_demo, and the .* a crate_demo with depth=2; --set model.depth=4 would"),
        (pretrained, "train.init_weights=ema", "has no average of its weights"),
    ):
        recipe = load_recipe(small_recipe, [*overrides, change, f"train.init_from={source}"])
        with pytest.raises(RecipeError, match=expected):
            preflight(recipe, 2, tmp_path / "run")
    for source in (pretrained, pretrained / "checkpoints" / "step-00000003", pretrained / "model-last.pt"):
        plain = preflight(load_recipe(small_recipe, [*overrides, f"train.init_from={source}"]), 2, tmp_path / "run")
        assert "whose model" not in str(plain)
    others = [*overrides, f"train.init_from={pretrained}", "model.tokenwise=mlp", "model.head=mean_patches"]
    said = str(preflight(load_recipe(small_recipe, others), 2, tmp_path / "run"))
    assert f"{pretrained}, whose model has other parts: --set model.tokenwise=ista --set model.head=linear" in said


def test_every_way_to_start_a_run_takes_weights_to_begin_from(
    pretrained: Path, three_classes: Path, small_recipe: Path, tmp_path: Path
) -> None:
    line: list[str | Path] = ["--config", small_recipe, "--data", three_classes, "--run-dir", tmp_path / "run"]
    for program in ("local.py", "slurm.py"):
        done = subprocess.run(
            [sys.executable, REPOSITORY / "launch" / program, *line, "--set", "data.val_split=", "--init-from", "run"]
            + ["--dry-run"]
            + (["--gpus-per-node", "0", "--container", "image.sqsh"] if program == "slurm.py" else ["--ranks", "2"]),
            cwd=pretrained.parent,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert f'init_from = "{pretrained}"' in done.stdout
        assert program == "local.py" or f"{pretrained.parent}:{pretrained.parent}" in done.stdout  # what it mounts


@pytest.mark.parametrize("data", ["cifar10", "cifar100", "flowers", "pets"])
def test_the_recipes_have_the_published_fine_tuning_code_s_values(data: str) -> None:
    recipe = load_recipe(f"finetune_{data}")
    optim, train = recipe.optim, recipe.train
    assert (optim.name, optim.lr, optim.weight_decay, optim.betas) == ("adamw", 5e-5, 0.01, None)
    assert (optim.schedule, optim.warmup_epochs, optim.grad_clip, optim.label_smoothing) == ("cosine", 0, 0, 0)
    assert (train.global_batch, train.epochs, recipe.model.image_size) == (256, 200, 224)
    assert augmentations(recipe.augment, recipe.images) == (RandAugment(ops=2, magnitude=14),)
    assert (recipe.images.eval_fit, recipe.augment.crop_scale, recipe.augment.flip) == ("stretch", (0.08, 1.0), 0.5)
    assert recipe.images.resize_filter == "bilinear"


def test_rows_of_the_head_are_taken_for_the_classes_that_both_have(files: dict[str, Path], alone: World) -> None:
    model = build_model(SECTION, 3, seed=1)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    there = torch.load(files["export"], weights_only=True)["state_dict"]
    origin = begin_from(files["export"], model, ["d", "new", "b"], "map")
    here = model.state_dict()
    for part in ("weight", "bias"):
        name = f"head.linear.{part}"
        assert torch.equal(here[name][[0, 2]], there[name][[3, 1]])
        assert torch.equal(here[name][1], own[name][1])
    assert torch.equal(here["head.norm.weight"], there["head.norm.weight"])
    assert origin.changes == ("head mapped by class, 2 rows taken from its 4, 1 new: new",)
    assert origin.sha256 == weights_digest(there)
    for name, classes, said in [
        ("unnamed", ["a", "b"], "by the ids of classes, which it does not tell"),
        ("export", ["x", "y"], r"none of the 2 classes of the data \(x, y, …\) is one of its 4 \(a, b, c, …\)"),
    ]:
        with pytest.raises(RecipeError, match=said):
            begin_from(files[name], model, classes, "map")
    wider = build_model(SECTION.model_copy(update={"arch": "crate_tiny"}), 3, seed=1)
    with pytest.raises(RecipeError, match=r"--set model\.arch=crate_demo"):
        begin_from(files["export"], wider, ["d", "new", "b"], "map")
