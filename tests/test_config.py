"""A recipe: TOML < command line, and an unknown key names the nearest."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from crate_dist.config import CONFIG_DIR, Recipe, RecipeError, derive_batch, load_recipe, new_names
from crate_dist.config.__main__ import put_into, settings
from crate_dist.config.keys import RENAMED
from crate_dist.config.recipe import recipe_of
from crate_dist.run.folder import RunFolder, differing_values, read_recipe

RECIPES = sorted(path.stem for path in CONFIG_DIR.glob("*.toml"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_loads_and_survives_being_written(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    copy = tmp_path / "recipe.toml"
    copy.write_text(recipe.to_toml())
    assert load_recipe(copy) == recipe
    assert recipe.train.global_batch % recipe.lanes == 0


def test_the_paper_s_and_the_published_code_s_values_are_there() -> None:
    paper, published = load_recipe("crate_large"), load_recipe("crate_large_reference")
    assert (paper.train.global_batch, paper.train.epochs, paper.optim.lr, paper.optim.weight_decay) == (
        2048,
        150,
        2.4e-4,
        0.5,
    )
    assert (published.train.global_batch, published.train.epochs, published.optim.lr) == (512, 200, 2e-4)
    assert published.optim.weight_decay == 0.05
    assert published.optim.grad_clip == 0
    assert (paper.images.resize_filter, published.images.resize_filter) == ("bicubic", "bilinear")
    assert {f"crate_{size}{kind}" for size in ("tiny", "small", "base", "large") for kind in ("", "_reference")} < set(
        RECIPES
    )


@pytest.mark.parametrize("name", ["crate_alpha_base_32", "crate_alpha_base_16", "crate_alpha_large_14"])
def test_crate_alpha_s_recipes_have_its_published_code_s_values(name: str) -> None:
    before, after = load_recipe(name), load_recipe(f"{name}_in1k")
    for recipe, lr, smoothing, operations in ((before, 8e-4, 0.0, 0), (after, 1.6e-4, 0.1, 2)):
        optim, mix, train = recipe.optim, recipe.mix, recipe.train
        assert (optim.name, optim.betas, optim.grad_clip, optim.schedule) == ("adamw", (0.9, 0.95), 1.0, "big_vision")
        assert (optim.lr, optim.min_lr, optim.warmup_epochs, optim.label_smoothing) == (lr, 1e-6, 10, smoothing)
        assert (optim.weight_decay, optim.decay) == (0.1, "kernels")
        assert (mix.mixup, mix.cutmix, mix.switch, mix.probability) == (0.8, 1.0, 0.5, 1.0)
        assert (train.global_batch, train.epochs) == (4096, 91)
        assert (recipe.augment.randaugment_ops, recipe.augment.flip) == (operations, 0.5)
        assert recipe.model.patch_size == int(name.rpartition("_")[2])
    assert (after.augment.randaugment, after.augment.randaugment_magnitude) == ("crate_alpha", 9)
    assert before.model == after.model
    assert after.train.init_head == "map"


def test_vit_is_trained_as_crate_is() -> None:
    for size in ("tiny", "small"):
        crate, vit = load_recipe(f"crate_{size}"), load_recipe(f"vit_{size}")
        differ = {key for key, value in crate.deciding_values().items() if vit.deciding_values()[key] != value}
        assert differ <= {"model.arch"}


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_a_recipe_says_itself_whether_gradients_are_clipped(size: str) -> None:
    paper, published = (
        tomllib.loads((CONFIG_DIR / f"crate_{size}{kind}.toml").read_text())["optim"] for kind in ("", "_reference")
    )
    assert (paper["grad_clip"], published["grad_clip"]) == (1.0, 0)


def test_a_run_from_before_a_key_had_a_name_goes_on(tmp_path: Path) -> None:
    recipe = load_recipe("crate_base")
    lines = recipe.to_toml().splitlines()
    older = tmp_path / "recipe.toml"
    older.write_text("\n".join(line for line in lines if not line.startswith("resize_filter")))
    assert load_recipe(older).deciding_values() == recipe.deciding_values()
    assert load_recipe(older, ["images.resize_filter=bilinear"]).deciding_values() != recipe.deciding_values()


OLD_NAMES = """
name = "older"
[model]
arch = "crate_demo"
[data]
workers = 1
lanes = 8
crop_scale = [0.5, 1.0]
eval_crop = 1.0
mean = [0.4914, 0.4822, 0.4465]
[optim]
lr = 1e-3
[train]
global_batch = 200
epochs = 8
"""


def test_keys_of_before_are_understood_with_one_note_that_names_the_new_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older = tmp_path / "older.toml"
    older.write_text(OLD_NAMES)
    recipe = load_recipe(older)
    assert (recipe.order.lanes, recipe.data.workers, recipe.augment.crop_scale) == (8, 1, (0.5, 1.0))
    assert (recipe.images.eval_crop, recipe.images.mean) == (1.0, (0.4914, 0.4822, 0.4465))
    assert load_recipe(older) == recipe
    (note,) = caplog.messages
    assert "data.lanes -> order.lanes, " in note
    assert "data.eval_crop -> images.eval_crop" in note
    assert note.startswith(f"{older}: ")

    caplog.clear()
    assert load_recipe("demo", ["data.eval_crop=0.9"]).images.eval_crop == 0.9
    assert caplog.messages == ["--set data.eval_crop: data.eval_crop is called images.eval_crop now"]


def test_a_key_under_both_its_names_is_refused(tmp_path: Path) -> None:
    both = tmp_path / "both.toml"
    both.write_text(OLD_NAMES + "[order]\nlanes = 4\n")
    with pytest.raises(RecipeError, match=r"both.toml: data.lanes is called order.lanes now"):
        load_recipe(both)


def test_a_run_from_before_the_keys_were_divided_goes_on(tmp_path: Path) -> None:
    folder, recipe = RunFolder(tmp_path / "run"), load_recipe("demo", ["order.window=17", "images.eval_fit=stretch"])
    folder.open(recipe)
    folder.metrics.write_text("{}\n")
    raw = tomllib.loads(folder.recipe_file.read_text())
    for section in ("order", "augment", "images"):  # of their keys, those that there were then
        table = raw.pop(section)
        raw["data"] |= {key: value for key, value in table.items() if f"data.{key}" in RENAMED}
    folder.recipe_file.write_text(tomli_w.dumps(raw))
    assert read_recipe(folder.path).deciding_values() == recipe.deciding_values()
    with pytest.raises(RecipeError, match=r"another recipe:\n  order.window: 17 there, 256 now\nto continue"):
        folder.check(load_recipe("demo", ["images.eval_fit=stretch"]))
    folder.open(recipe)
    assert read_recipe(folder.path) == recipe
    assert "[order]" in folder.recipe_file.read_text()


@pytest.mark.parametrize(("before", "now"), [("true", "all"), ("false", "matrices")])
def test_which_weights_decay_is_understood_as_it_was_said_before(tmp_path: Path, before: str, now: str) -> None:
    older = tmp_path / "older.toml"
    older.write_text(OLD_NAMES.replace("[optim]", f"[optim]\ndecay_all = {before}"))
    assert load_recipe(older).optim.decay == load_recipe("demo", [f"optim.decay_all={before}"]).optim.decay == now
    assert new_names({"optim.decay_all": before == "true"}) == {"optim.decay": now}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optim.min_lr=1"], r"min_lr 1 is above lr 0\.\d+, the highest learning rate; 0\.\d+ or less would do"),
        (["optim.warmup_lr=1"], "warmup_lr 1 is above lr"),
        (["optim.cooldown_epochs=2"], "cooldown_epochs 2 at min_lr 0 would change no weight; give a min_lr above 0"),
        (
            ["optim.cooldown_epochs=9", "optim.min_lr=1e-6", "train.epochs=9"],
            "leave none for the rate to fall in; less than 7 would",
        ),
        (["optim.layer_decay=1.1"], "less than or equal to 1"),
        (["optim.decay=norms"], "optim.decay: Input should be 'all', 'matrices', 'weights' or 'kernels', not 'norms'"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe("demo", overrides)


def test_the_command_line_wins_over_the_file() -> None:
    recipe = load_recipe(
        "crate_base",
        ["optim.lr=1e-3", "augment.crop_scale=[0.2, 1.0]", "cluster.partition=gpu-a100", "data.val_split=''"],
        train__seed=7,
        cluster__account=None,
    )
    assert recipe.optim.lr == 1e-3
    assert recipe.augment.crop_scale == (0.2, 1.0)
    assert recipe.cluster.partition == "gpu-a100"
    assert recipe.data.val_split == ""
    assert recipe.train.seed == 7


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.learning_rate=1", "unknown key 'optim.learning_rate'"),
        ("optim.weight_deca=1", "did you mean 'optim.weight_decay'"),
        ("train.lr=1", "did you mean 'optim.lr'"),
        ("optim.lr", "expected section.key=value"),
        ("train.epochs=many", "train.epochs: "),
        ("train.epochs=0", "greater than 0, not 0"),
        ("model.arch=crate_huge", "crate_large"),
        ("model.patch_size=15", "image_size 224 is no multiple of patch_size 15; 210 would be"),
        ("optim.name=sgd", "'lion' or 'adamw'"),
    ],
)
def test_a_wrong_override_says_what_would_do(override: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("crate_base", [override])
    assert expected in str(caught.value)


def test_a_wrong_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'crate_large'"):
        load_recipe("crate_larg")
    path = tmp_path / "broken.toml"
    path.write_text("[model")
    with pytest.raises(RecipeError, match="is not TOML"):
        load_recipe(path)
    path.write_text('[model]\narch = "crate_tiny"\n[optim]\nlr = 1\nwarmup = 3\n[train]\nglobal_batch = 1\nepochs = 1')
    with pytest.raises(
        RecipeError, match=r"broken.toml(.|\n)*unknown key 'optim.warmup' \(did you mean 'optim.warmup_ep"
    ):
        load_recipe(path)


@given(st.integers(1, 4096), st.integers(1, 64), st.integers(1, 512))
def test_the_cluster_does_not_change_the_global_batch(global_batch: int, world_size: int, largest: int) -> None:
    if global_batch % world_size:
        with pytest.raises(RecipeError, match=f"batch of {global_batch} does not divide over {world_size} ranks"):
            derive_batch(global_batch, world_size, largest)
        return
    micro, accumulation = derive_batch(global_batch, world_size, largest)
    assert micro * accumulation * world_size == global_batch
    assert micro <= largest


def test_a_batch_that_does_not_divide_says_which_numbers_would() -> None:
    with pytest.raises(
        RecipeError, match=r"2048 does not divide over 24 ranks; it does over 4, 8, 16, 32.*=2040 or 2064"
    ):
        derive_batch(2048, 24, 128)


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 512), st.integers(1, 32))
def test_every_micro_batch_holds_groups_whole(groups: int, world_size: int, largest: int, group: int) -> None:
    if groups % world_size:
        with pytest.raises(RecipeError, match=f"not divide over {world_size} ranks.*these ranks take") as refused:
            derive_batch(groups * group, world_size, largest, group)
        would = int(re.findall(r"\d+", str(refused.value))[-1])
        assert derive_batch(would, world_size, would, group)
    elif largest < group:
        with pytest.raises(RecipeError, match=f"no room for a group of {group}; --set train.micro_batch={group} has"):
            derive_batch(groups * group, world_size, largest, group)
    else:
        micro, accumulation = derive_batch(groups * group, world_size, largest, group)
        assert micro * accumulation * world_size == groups * group
        assert micro <= largest
        assert micro % group == 0


def test_only_what_decides_the_result_is_held_against_a_resume() -> None:
    recipe = load_recipe("crate_base")
    same = load_recipe("crate_base", ["data.workers=1", "train.micro_batch=8", "cluster.nodes=9", "log.every_steps=1"])
    other = load_recipe("crate_base", ["order.window=17"])
    assert isinstance(recipe, Recipe)
    assert recipe.deciding_values() == same.deciding_values()
    assert recipe.deciding_values() != other.deciding_values()


def test_the_page_on_training_has_every_setting_as_it_is_today() -> None:
    page = (CONFIG_DIR.parent / "docs" / "training.md").read_text(encoding="utf-8")
    assert put_into(page) == page, "python -m crate_dist.config docs/training.md brings it up to date"
    assert all(f"| `{key}` |" in page for key in load_recipe("demo").deciding_values())


def test_every_setting_says_what_it_means() -> None:
    rows = [line.strip("| ").split(" | ") for line in settings().splitlines() if line.startswith("| `")]
    assert len(rows) > 70
    assert all(len(row) == 4 and len(row[3].split()) > 1 for row in rows)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("augment.crop_ratio=[0,0]", "augment.crop_ratio.0: Input should be greater than 0"),
        ("augment.crop_scale=[0.9,0.2]", "augment.crop_scale: the lower bound 0.9 is above the upper one, 0.2"),
        ("augment.crop_scale=[0.5,2]", "augment.crop_scale.1: Input should be less than or equal to 1"),
        ("images.std=[0,1,1]", "images.std.0: Input should be greater than 0"),
        ("images.mean=[nan,0,0]", "images.mean.0: Input should be a finite number"),
        ("optim.lr=inf", "optim.lr: Input should be a finite number"),
        ("optim.betas=[0.9,1.0]", "optim.betas.1: Input should be less than 1"),
        ("model.layer_scale=0.5", "model: layer_scale 0.5 would change nothing"),
        ("optim.eps=-1", "optim.eps: Input should be greater than 0"),
    ],
)
def test_values_that_no_training_can_have_are_refused_before_anything_starts(given: str, said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe("demo", [given])
    assert str(refused.value).startswith(f"--set {given}: {said}"), "blames the recipe file"


@pytest.mark.parametrize(
    ("given", "near"),
    [("data.lane", "order.lanes"), ("data.means", "images.mean"), ("optim.nam", "optim.name"), ("lr", "optim.lr")],
)
def test_an_unknown_key_names_the_nearest_in_any_section(given: str, near: str) -> None:
    with pytest.raises(RecipeError, match=f"did you mean '{near}'"):
        load_recipe("demo", [f"{given}=1"])


def test_any_file_can_be_a_recipe_and_a_name_is_looked_for_in_configs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text((CONFIG_DIR / "crate_tiny.toml").read_text())
    assert load_recipe("demo").model.arch == "crate_demo"
    assert load_recipe(Path("demo")).model.arch == "crate_tiny"


def test_an_option_of_a_part_is_kept_compared_and_refused_where_no_part_takes_it(tmp_path: Path) -> None:
    plain, changed = load_recipe("cbt_tiny"), load_recipe("cbt_tiny", ["model.options.cells=4"])
    (tmp_path / "recipe.toml").write_text(changed.to_toml())
    assert read_recipe(tmp_path) == changed == load_recipe("cbt_tiny", ["model.options={cells=4}"])
    assert recipe_of("cbt_tiny", changed.deciding_values()).model == changed.model
    assert "model.options.cells: 8 there, 4 now" in differing_values(plain, changed)
    for recipe, option, said in (
        ("cbt_tiny", "cell=4", r"no part of this model takes options.cell \(did you mean 'cells'\?\)"),
        ("crate_tiny", "cells=4", "takes options.cells; they take none"),
        ("cbt_tiny", "cells=4.5", "options.cells is a whole number, not 4.5"),
        ("cbt_tiny", "cells=0", "whole number above 0"),
    ):
        with pytest.raises(RecipeError, match=said):
            load_recipe(recipe, [f"model.options.{option}"])


def test_a_model_is_described_by_what_it_has_otherwise_than_its_architecture() -> None:
    assert load_recipe("demo").model.described() == "crate_demo"
    other = ["model.mixer=cbsa_aligned", "model.options.cells=2", "model.width=48", "model.norm_eps=1e-6"]
    described = load_recipe("demo", other).model.described()
    assert described == "crate_demo with width=48, mixer=cbsa_aligned, options.cells=2"
