"""Says what TensorBoard shows of a run beside its curves: charts of several of them, and texts. Imports no torch."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from crate_dist.config import Recipe
from crate_dist.config.keys import flatten
from crate_dist.config.parts import MIXERS, TOKENWISE
from crate_dist.run.dashboard import Tag
from crate_dist.whitebox.titles import measure_title

_OF_BOTH = {"loss": "loss", "top-1 [%]": "top1"}


def charts(
    named: Tag, measures: Mapping[str, str] = MappingProxyType({}), averaged: bool = False
) -> dict[str, dict[str, str]]:
    """Returns the charts of "Custom Scalars" with several curves each; see Curves.charts.

    measures: what is measured of every layer, such as "whitebox/zeros" -> its title
    averaged: whether the average of the weights is evaluated as well
    """
    of = ("train/", "val/", "val/ema_") if averaged else ("train/", "val/")
    pairs = {title: [f"{whose}{name}" for whose in of] for title, name in _OF_BOTH.items()}
    layers = {title: named(f"{name}/layer-") + r"\d+" for name, title in measures.items()}
    return {
        "train and val": {title: "|".join(map(named, names)) for title, names in pairs.items()},
        **({"white box, layer by layer": layers} if layers else {}),
    }


def measure_titles(recipe: Recipe, names: Iterable[str]) -> dict[str, str]:
    """Returns what the measures of a recipe's layers, such as "whitebox/zeros", are called for people."""
    parts = recipe.model.parts()
    classes = (
        table[name].path.rpartition(".")[2] for table, name in ((MIXERS, parts.mixer), (TOKENWISE, parts.tokenwise))
    )
    mixer, tokenwise = classes
    return {name: measure_title(name.removeprefix("whitebox/"), mixer, tokenwise) for name in names}


def recipe_text(recipe: Recipe) -> str:
    """Returns a recipe as a table in Markdown; what recipe.toml leaves out is left out here."""
    values = flatten(tomllib.loads(recipe.to_toml()))
    return _table(("setting", "value"), ((f"`{key}`", _code(value)) for key, value in values.items()))


def environment_text(code: Mapping[str, Any], **facts: object) -> str:
    """Returns what a run began with as a table in Markdown: its code as run.json has it, and more facts."""
    commit = str(code.get("commit") or "none: no git checkout") + (" and changes" if code.get("changed") else "")
    known = {"commit": commit, **facts, "python": code.get("python"), **code.get("packages", {})}
    return _table(("what", "which"), ((name, _code(value)) for name, value in known.items() if value is not None))


def starts_text(starts: Sequence[Mapping[str, Any]], reasons: Sequence[str] = ()) -> str:
    """Returns the starts of a run as a table in Markdown, as run.json has them. reasons: of each but the first"""
    known = ("step", "time", "host", "world_size", "launcher", "commit")
    why = ["", *reasons]
    rows = (
        (number, *(start.get(key, "") for key in known), why[number] if number < len(why) else "")
        for number, start in enumerate(starts)
    )
    return _table(("start", "from step", "at", "rank 0 on", "ranks", "by", "commit", "why again"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [[str(cell).replace("|", r"\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    lines.insert(1, ["---"] * len(head))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(value: object) -> str:
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"
