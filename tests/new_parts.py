"""Parts of a model that somebody might write by docs/hacking.md, put in the tables under a name for one test."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest


def add_part(patch: pytest.MonkeyPatch, table: dict[str, str], name: str, part: Any) -> None:
    """Has a recipe find the class `part` under `name` in a table of config/parts.py, as if its file were there."""
    module = ModuleType(f"crate_dist.models.of_a_test_{name}")
    module.Part = part  # type: ignore[attr-defined]
    patch.setitem(sys.modules, module.__name__, module)
    patch.setitem(table, name, f"of_a_test_{name}.Part")
