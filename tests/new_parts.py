"""Parts of a model that somebody might write by docs/hacking.md, put in the tables under a name for one test."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from crate_dist.config.parts import Part


def add_part(patch: pytest.MonkeyPatch, table: dict[str, Part], name: str, part: Any, **row: Any) -> None:
    """Has a recipe find the class `part` under `name` in a table of config/parts.py, as if its file were there.

    row: what else stands in its row
    """
    module = ModuleType(f"crate_dist.models.of_a_test_{name}")
    module.Part = part  # type: ignore[attr-defined]
    patch.setitem(sys.modules, module.__name__, module)
    patch.setitem(table, name, Part(f"of_a_test_{name}.Part", **row))
