"""Keys of a recipe, `section.key`: those of before, the nearest to a wrong one, and values from the command line."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Collection, Mapping
from functools import cache
from logging import getLogger
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from crate_dist.config.hints import NOT_NEEDED, meant_keys
from crate_dist.errors import UserError

logger = getLogger(__name__)

_MOVED_OUT_OF_DATA = {
    "order": ("lanes", "window"),
    "augment": ("crop_scale", "crop_ratio", "flip", "randaugment_ops", "randaugment_magnitude", "erase"),
    "images": ("resize_filter", "mean", "std", "eval_fit", "eval_crop"),
}
_DECAY_ALL = "optim.decay_all"
_OPEN = {"model.options"}
"""Tables whose keys are not known here: the parts of a model say them."""
RENAMED = {
    _DECAY_ALL: "optim.decay",
    **{f"data.{key}": f"{section}.{key}" for section, keys in _MOVED_OUT_OF_DATA.items() for key in keys},
}
"""Keys of recipes, run folders and weights from before, and what they are called now."""


class RecipeError(UserError, ValueError):
    """A recipe or an override that cannot be used; the message says what was given and what would do."""


def renamed(key: str, value: Any) -> tuple[str, Any]:
    """Returns a key's name of today, and the value that says there what the given one said."""
    if key == _DECAY_ALL and isinstance(value, bool):
        value = "all" if value else "matrices"
    return RENAMED.get(key, key), value


def new_names(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the same values by section.key, under the names that the keys have now."""
    return dict(renamed(key, value) for key, value in flat.items())


def rename(raw: dict[str, Any], origin: str) -> None:
    """Moves nested values to the names that their keys have now, and says so once. Raises RecipeError for both."""
    notes = []
    for old, new in RENAMED.items():
        (section, key), (now, name) = old.split("."), new.split(".")
        if not (isinstance(table := raw.get(section), dict) and key in table):
            continue
        target = raw.setdefault(now, {})
        if not isinstance(target, dict) or name in target:
            raise RecipeError(f"{origin}: {old} is called {new} now, and cannot stand beside it")
        target[name] = renamed(old, table.pop(key))[1]
        notes.append(f"{old} -> {new}")
    if notes:
        _note(f"{origin}: keys that have new names: {', '.join(notes)}")


def assign(raw: dict[str, Any], key: str, value: Any, known: Mapping[str, str], origin: str) -> None:
    """Sets a nested value by its flat key, which may be an old one. Raises RecipeError for one that is not known."""
    if key in RENAMED:
        _note(f"{origin}: {key} is called {RENAMED[key]} now")
        key, value = renamed(key, value)
    if key not in known and key.rpartition(".")[0] not in _OPEN:
        raise RecipeError(f"{origin}: {unknown_key(key, known)}")
    *sections, last = key.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
    raw[last] = value


@cache
def _note(text: str) -> None:
    """Warns once in a process, of the first rank alone: a start reads the recipe of a run folder several times."""
    if int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0:
        logger.warning("%s", text)


def parse_value(text: str) -> Any:
    """Reads a value as TOML, true and false also in capitals, and as plain text where it is none of them."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text.lower() == "true" if re.fullmatch(r"(?i)true|false", text) else text


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested values by their flat keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def keys_of(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Returns the meanings of the flat keys that a model knows, its sections' too."""
    keys: dict[str, str] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys |= keys_of(field.annotation, f"{prefix}{name}.")
        else:
            keys[prefix + name] = field.description or ""
    return keys


def nearest(given: str, known: Collection[str]) -> str:
    """Returns " (did you mean 'NAME'?)", or nothing where no known name is like the given one."""
    for name in difflib.get_close_matches(given, known, n=1):
        return f" (did you mean {name!r}?)"
    return ""


def unknown_key(given: str, known: Mapping[str, str]) -> str:
    """Says that there is no such key, and which one is meant, as far as that can be told. known: meanings by key"""
    word = given.rpartition(".")[2].lower()
    if inside := [key for key in known if key.startswith(f"{given}.")]:
        return f"{given!r} is a table, and has keys of its own: {', '.join(inside)}"
    if reason := NOT_NEEDED.get(word):
        return f"unknown key {given!r}: {reason}"
    meant = [key for key in meant_keys(word, known) if key in known]
    if any(key.rpartition(".")[2] == word for key in meant):  # the section may be the wrong one
        return f"unknown key {given!r}{nearest(given, meant) or f' (did you mean {meant[0]!r}?)'}"
    if meant:
        return f"unknown key {given!r} (did you mean {', or '.join(f'{key!r}, {known[key]}' for key in meant)}?)"
    by_word: dict[str, list[str]] = {}
    for key in known:
        by_word.setdefault(key.rpartition(".")[2], []).append(key)
    for near in difflib.get_close_matches(word, by_word, n=1):
        (closest,) = difflib.get_close_matches(given, by_word[near], n=1, cutoff=0)
        return f"unknown key {given!r} (did you mean {closest!r}?)"
    return f"unknown key {given!r}; --help-settings lists all keys"


def explain(item: ErrorDetails, known: Mapping[str, str], origins: Mapping[str, str], elsewhere: str) -> str:
    """Puts one of pydantic's errors into a line: where the value was given, its key, what is wrong and would do.

    origins: of the values by flat key; elsewhere: of those that it does not have
    """
    key = ".".join(str(part) for part in item["loc"])
    given_here = (
        said for name, said in origins.items() if f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.")
    )
    origin = ", ".join(dict.fromkeys(given_here)) or elsewhere
    if item["type"] == "extra_forbidden":
        return f"{elsewhere}: {unknown_key(key, known)}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "missing":
        return f"{elsewhere}: {key} is missing: {known.get(key) or 'a table'}"
    if item["type"] == "string_pattern_mismatch":
        message = (
            "Input should be a name of letters, digits, and . _ - inside"
            if key == "name"
            else "Input should be one word"
        )
    given = "" if item["type"] == "value_error" else f", not {item['input']!r}"
    return f"{origin}: {key + ': ' if key else ''}{message}{given}"
