"""What the rows of config/parts.py say decides which models there can be, for recipes and for models alike."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from crate_dist.config import RecipeError, load_recipe
from crate_dist.config.parts import HEADS, MIXERS, PARTS, RESIDUALS, STEMS, TOKENWISE, Option, Part
from crate_dist.launching.grid import save_grid
from crate_dist.launching.memory import step_bytes
from crate_dist.models.build import initialise
from crate_dist.models.config import ModelConfig, model_config
from crate_dist.models.costs import RULES, kept_bytes, step_flops
from crate_dist.models.parts import find_part
from crate_dist.models.weights.read import load_model
from crate_dist.models.weights.write import export_model
from crate_dist.run.folder import differing_values, read_recipe

PLAIN: dict[str, Any] = {"image_size": 16, "patch_size": 4, "num_classes": 2, "dim": 24, "depth": 1, "heads": 3}


def refusal(**changes: Any) -> str:
    """Returns why there is no such model, which the recipe and the model say in the same words."""
    arch = {"width" if key == "dim" else key: value for key, value in (PLAIN | changes).items()}
    with pytest.raises(ValueError, match=r"\w") as model:
        ModelConfig(**(PLAIN | changes))
    with pytest.raises(RecipeError) as recipe:
        load_recipe("demo", **{f"model__{key}": value for key, value in arch.items()})
    assert str(recipe.value).endswith(f": model: {model.value}")
    return str(model.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"class_token": False}, 'pool = "mean" reads the patches'),
        ({"head": "class_attention"}, "brings a class token of its own: class_token = false would do"),
        (
            {"mixer": "cbsa", "class_token": False, "pool": "mean"},
            "class_token = true would do, or another mixer: mssa",
        ),
        ({"stem": "convolutions", "patch_size": 2}, "patch_size is one of 4, 8, 16, not 2"),
        ({"stem": "convolutions", "dim": 27}, "a width of 27 / 2 for patches of 4 pixels; 26 would divide"),
        ({"heads": 5}, "it does into 1, 2, 3"),
        ({"image_size": 18}, "16 would be"),
        ({"options": {"cells": 4}}, "they take none; model.options={} leaves out all"),
    ],
)
def test_a_recipe_is_refused_as_its_model_would_be(changes: dict[str, Any], said: str) -> None:
    assert said in refusal(**changes)


def test_a_model_of_a_part_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"there is no mixer 'msa' \(did you mean 'mssa'\?\); there are: mssa, tssa"):
        ModelConfig(**PLAIN, mixer="msa")


def test_what_was_trained_stays_what_it_was_when_a_default_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"model.mixer": "cbsa_aligned", "model.depth": 1}
    before = load_recipe("demo", [f"{key}={value}" for key, value in given.items()])
    (tmp_path / "recipe.toml").write_text(before.to_toml())
    model = initialise(model_config(before.model, 2), seed=0)
    export_model(tmp_path / "model.pt", model.config, model.state_dict())
    monkeypatch.setitem(MIXERS, "cbsa_aligned", replace(MIXERS["cbsa_aligned"], options={"cells": 2}))
    assert read_recipe(tmp_path).model.options == {"cells": 8}
    assert load_model(tmp_path / "model.pt")[0].config.option("cells") == 8
    now = load_recipe("demo", [f"{key}={value}" for key, value in given.items()])
    assert differing_values(read_recipe(tmp_path), now) == ["model.options.cells: 8 there, 2 now"]


def test_a_run_from_before_options_were_kept_goes_on_with_those_of_today(tmp_path: Path) -> None:
    recipe = load_recipe("cbt_tiny")
    table = tomllib.loads(recipe.to_toml())
    assert table["model"].pop("options") == {"cells": 8}
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(table))
    assert read_recipe(tmp_path) == recipe
    assert differing_values(read_recipe(tmp_path), recipe) == []


def test_a_runs_recipe_may_have_another_part_without_the_options_that_nobody_gave(tmp_path: Path) -> None:
    stored, other = tmp_path / "recipe.toml", ["model.mixer=tssa"]
    stored.write_text(load_recipe("cbt_tiny").to_toml())
    assert load_recipe(stored, other).model == load_recipe("cbt_tiny", other).model
    with pytest.raises(RecipeError, match=r"takes options\.cells"):
        load_recipe(stored, [*other, "model.options.cells=8"])
    stored.write_text(load_recipe("cbt_tiny", ["model.options.cells=4"]).to_toml())
    with pytest.raises(RecipeError, match=r"takes options\.cells"):
        load_recipe(stored, other)
    assert load_recipe(stored, ["model.mixer=cbsa_aligned"]).model.options == {"cells": 4}


def test_a_sweep_over_parts_goes_on_though_its_first_run_has_options_that_others_do_not_take(tmp_path: Path) -> None:
    grid = {"model.mixer": ["cbsa", "mssa"]}
    runs = [load_recipe("cbt_tiny", [f"model.mixer={name}"]) for name in grid["model.mixer"]]
    save_grid(tmp_path, grid, runs[0])
    again = [load_recipe(tmp_path / "base.toml", [f"model.mixer={name}"]) for name in grid["model.mixer"]]
    assert [differing_values(*pair) for pair in zip(runs, again, strict=True)] == [[], []]
    with pytest.raises(RecipeError, match=r"takes options.cells; they take none; model.options=\{\} leaves out"):
        load_recipe("cbt_tiny", ["model.options.cells=4", "model.mixer=mssa"])


def test_two_parts_of_a_model_cannot_have_an_option_of_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MIXERS, "mssa", replace(MIXERS["mssa"], options={"step": 1.0}))
    monkeypatch.setitem(TOKENWISE, "ista", replace(TOKENWISE["ista"], options={"step": 2}))
    assert refusal().startswith('mixer = "mssa" and tokenwise = "ista" both have an option step')
    assert ModelConfig(**PLAIN, tokenwise="mlp").options == {"step": 1.0}


def test_an_option_is_that_of_a_kind_of_part_and_not_of_all_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HEADS, "linear", replace(HEADS["linear"], options={"temperature": 1.0}))
    said = refusal(stem="linear", head="mean_patches", options={"temperature": 3.0})
    assert said.startswith("no part of this model takes options.temperature; they take none")


def test_an_option_has_the_bounds_that_its_row_says(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, float | Option] = {"power": Option(3.0, above=0), "times": 2, "bias": 0.0}
    options |= {"share": Option(0.5, above=-1, to=1)}
    monkeypatch.setitem(HEADS, "linear", replace(HEADS["linear"], options=options))
    for given, said in (
        ({"power": 0}, "options.power is a number above 0, not 0"),
        ({"share": 1.5}, "options.share is a number above -1 and of at most 1, not 1.5"),
        ({"times": 0}, "options.times is a whole number above 0, not 0"),
        ({"times": 2.0}, "options.times is a whole number, not 2.0"),
    ):
        assert refusal(options=given) == said
    with pytest.raises(ValueError, match=r"options.bias is a number, not inf"):
        ModelConfig(**PLAIN, options={"bias": float("inf")})
    assert ModelConfig(**PLAIN, options={"bias": -9, "share": 1}).options == {
        "power": 3.0,
        "share": 1,
        "times": 2,
        "bias": -9,
    }


def test_a_stem_with_batch_norm_needs_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STEMS, "mine", Part("stems.patches.PatchEmbedding", batch_norm=True))
    with pytest.raises(RecipeError, match=r'stem = "mine" has batch norm.*, which is 1; --set train.group='):
        load_recipe("demo", ["model.stem=mine"])
    assert load_recipe("demo", ["model.stem=mine", "train.group=8"]).model.stem == "mine"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["ratio=8"], "ratio 8 would change nothing: no part of this model reads it, only tokenwise odl"),
        (["tokenwise=mlp", "ista_step=0.2"], "ista_step 0.2 would change nothing"),
        (["head=mean_patches", "pool=mean"], "pool mean would change nothing: .* only head linear"),
        (["layer_scale=0.5"], "layer_scale 0.5 would change nothing: .* only residual pre_norm, head class_attention"),
    ],
)
def test_what_nothing_reads_is_refused_where_somebody_gives_it(given: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe("demo", [f"model.{text}" for text in given])
    file = tmp_path / "mine.toml"
    table = tomllib.loads(load_recipe("demo").to_toml())
    table["model"] |= tomllib.loads("\n".join(text.replace("=", '="') + '"' for text in given[:-1]))
    key, _, value = given[-1].partition("=")
    table["model"][key] = value if value == "mean" else float(value)
    file.write_text(tomli_w.dumps(table))
    with pytest.raises(RecipeError, match=said):
        load_recipe(file)
    stored = file.rename(tmp_path / "recipe.toml")  # a run's, from when nobody was told
    there = read_recipe(stored.parent)
    assert getattr(there.model, key) == table["model"][key]
    here = load_recipe("demo", [f"model.{text}" for text in given[:-1]])
    assert not [line for line in differing_values(there, here) if line.startswith("model.")], "it decides nothing"


def test_a_row_says_what_its_part_reads() -> None:
    asked = set[str]()
    optional = asked.union(*(part.reads for table in PARTS.values() for part in table.values()))

    class Asked(ModelConfig):
        """Notes what is asked of it."""

        def __getattribute__(self, name: str) -> Any:
            if name in optional:
                asked.add(name)
            return super().__getattribute__(name)

    for kind, table in PARTS.items():
        for name, row in table.items():
            fitting = {"patch_size": next(iter(row.patches), 4), "class_token": row.class_token is not False}
            config = Asked(**(PLAIN | fitting | {kind: name, "pool": "mean", "depth": 1}))
            asked.clear()
            find_part(table, name)(config)
            inside = MIXERS["mssa"].reads | TOKENWISE["ista"].reads if kind == "residual" else set()
            assert asked - inside == set(row.reads), f"{kind} {name}"


def test_a_part_under_another_name_costs_the_same_by_its_own_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {"stem": (STEMS, "linear"), "tokenwise": (TOKENWISE, "odl"), "residual": (RESIDUALS, "pre_norm")}
    for one in (kinds, {"tokenwise": (TOKENWISE, "ista"), "head": (HEADS, "linear"), "stem": (STEMS, "convolutions")}):
        found = []
        for mine in (False, True):
            for kind, (table, name) in one.items():
                monkeypatch.setitem(table, f"{name}_of_mine", table[name])
                monkeypatch.setitem(RULES[kind], f"{name}_of_mine", RULES[kind][name])
            given = [f"model.{kind}={name}{'_of_mine' * mine}" for kind, (_, name) in one.items()]
            recipe = load_recipe("demo", ["train.group=8", *given])
            config = model_config(recipe.model, 10)
            found.append((step_bytes(recipe, 8, 2), step_flops(config, 8), kept_bytes(config, 8, "bf16")))
        assert found[0] == found[1]
