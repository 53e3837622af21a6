"""Every setting of a recipe, told by the sections themselves: for a terminal here, for a page in __main__.py."""

from __future__ import annotations

import difflib
import json
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from crate_dist.config.hints import meant_keys
from crate_dist.config.keys import flatten
from crate_dist.config.recipe import Recipe

_TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "object": "table of numbers",
}
_BOUNDS = {"exclusiveMinimum": "above", "minimum": "from", "maximum": "to", "exclusiveMaximum": "below"}
_NARROWEST, _WIDEST = 60, 120  # columns


@dataclass(frozen=True)
class Setting:
    """One key of a recipe. kind: of value that it takes; default: as TOML has it, "unset", or "required"."""

    key: str
    kind: str
    default: str
    meaning: str


@cache
def sections() -> Mapping[str, tuple[str, tuple[Setting, ...]]]:
    """Returns what each section is for, and its settings, by its name."""
    schema = Recipe.model_json_schema()
    found = {}
    for name, place in schema["properties"].items():
        if "$ref" not in place:  # the run's name, which is in no section
            continue
        section = schema["$defs"][place["$ref"].rpartition("/")[2]]
        required = section.get("required", ())
        settings = (
            Setting(
                f"{name}.{key}",
                _kind(setting),
                "required" if key in required else _value(setting["default"]),
                setting["description"],
            )
            for key, setting in section["properties"].items()
        )
        found[name] = (section["description"], tuple(settings))
    return found


def meanings() -> dict[str, str]:
    """Returns what every key means."""
    return {setting.key: setting.meaning for _, settings in sections().values() for setting in settings}


def as_text(word: str = "", recipe: Recipe | None = None) -> str:
    """Lists the settings whose key or meaning has the word in it, for a terminal.

    recipe: whose values are shown where they are not the defaults

    Raises KeyError: no setting has it; the message names the nearest.
    """
    meant = set(meant_keys(word.rpartition(".")[2], meanings()))
    lower = word.lower()
    chosen = {
        name: [s for s in settings if s.key in meant or lower in s.key.replace("-", "_") or lower in s.meaning.lower()]
        for name, (_, settings) in sections().items()
    }
    if not any(chosen.values()):
        words = {part for key in meanings() for part in (key, *re.split("[._]", key))}
        near = difflib.get_close_matches(lower, sorted(words), n=3)
        raise KeyError(
            f"no setting has {word!r} in its key or its meaning; "
            + (f"there are {', '.join(near)}" if near else "without a word all of them are listed")
        )
    values = flatten(recipe.model_dump(mode="json")) if recipe else {}
    lines = [line for name, settings in chosen.items() if settings for line in _section(name, settings, recipe, values)]
    return "\n".join([*lines, "--set SECTION.KEY=VALUE changes one of them, and so does a line of a recipe file."])


def _section(name: str, settings: list[Setting], recipe: Recipe | None, values: Mapping[str, Any]) -> Iterator[str]:
    width = min(max(shutil.get_terminal_size().columns, _NARROWEST), _WIDEST)
    yield from textwrap.wrap(f"[{name}] {sections()[name][0]}", width)
    for setting in settings:
        default = setting.default if setting.default in ("required", "unset") else f"default {setting.default}"
        if recipe and setting.key in values and (value := _value(values.get(setting.key))) != setting.default:
            default += f"; {recipe.name}: {value}"
        yield f"  {setting.key}    {setting.kind}; {default}"
        yield from textwrap.wrap(setting.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    yield ""


def _kind(setting: Mapping[str, Any]) -> str:
    if "anyOf" in setting:
        kinds = (_kind(kind) for kind in setting["anyOf"] if kind["type"] != "null")
        return " or ".join(dict.fromkeys(kinds))
    if choices := setting.get("enum") or ("const" in setting and [setting["const"]]):
        return " or ".join(map(_value, choices))
    if setting["type"] == "array" and "enum" in setting.get("items", ()):
        return "any of " + ", ".join(map(_value, setting["items"]["enum"]))
    if setting["type"] == "array":
        one = setting.get("items") or setting["prefixItems"][0]
        name = _TYPES[one["type"]]
        return f"{setting.get('maxItems', 'any number of')} {_kind(one).replace(name, f'{name}s', 1)}"
    if setting.get("format") == "path":
        return "path"
    bounds = (f"{word} {setting[key]:g}" for key, word in _BOUNDS.items() if key in setting)
    return " ".join([_TYPES[setting["type"]], *bounds])


def _value(value: Any) -> str:
    return "unset" if value is None else json.dumps(value)
