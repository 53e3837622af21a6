"""Finds the class of a part by its name in a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from crate_dist.config.parts import Part

_BELOW = "crate_dist"
"""The tables name modules below its room models; they are the project's own, and no recipe says a module."""


def find_part(table: Mapping[str, Part], name: str) -> Any:
    """Returns the class that a table of config/parts.py has under `name`. Raises ValueError that lists the names."""
    if name not in table:
        raise ValueError(f"there is no {name!r}; there are: {', '.join(table)}")
    module, _, part = table[name].path.rpartition(".")
    return getattr(import_module(f"{_BELOW}.models.{module}"), part)
