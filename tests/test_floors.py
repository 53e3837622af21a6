"""The house: no import runs from a lower floor to a higher one, and none runs in a circle."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "crate_dist"
FLOOR = re.compile(r"^(\d+)  (\w+(?:  ?\w+)*)   ", re.MULTILINE)


def floors() -> dict[str, int]:
    """Room or module -> its floor, as docs/design.md draws it."""
    drawn = FLOOR.findall((REPOSITORY / "docs" / "design.md").read_text(encoding="utf-8"))
    return {name: int(number) for number, names in drawn for name in names.split()}


def imports() -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, anywhere in it; names without "crate_dist."."""
    paths = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in paths.items() if name != "__init__"}
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module} has a relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            ours = (name.removeprefix("crate_dist.") for name in names if name.startswith("crate_dist."))
            found[module] |= {name if name in modules else name.rpartition(".")[0] for name in ours}
    return found


def test_every_room_is_in_the_picture_and_the_picture_has_no_other() -> None:
    assert {module.partition(".")[0] for module in imports()} == floors().keys()


def test_no_import_runs_up() -> None:
    floor = floors()
    arrows = [(module, other) for module, others in imports().items() for other in others]
    up = [(a, b) for a, b in arrows if floor[a.partition(".")[0]] < floor[b.partition(".")[0]]]
    assert not up
    sideways = {(a.partition(".")[0], b.partition(".")[0]) for a, b in arrows}
    circles = [(a, b) for a, b in sideways if a < b and (b, a) in sideways]
    assert not circles


def test_no_import_runs_in_a_circle() -> None:
    order = list(TopologicalSorter({module: others - {module} for module, others in imports().items()}).static_order())
    assert len(order) > 50


def test_nothing_but_the_programs_that_prepare_data_needs_the_room_prep() -> None:
    assert not [module for module, others in imports().items() for other in others if other.startswith("prep.")
                and not module.startswith("prep.")]  # fmt: skip


def test_every_room_says_in_its_docstring_what_it_is_for() -> None:
    rooms = list(PACKAGE.rglob("__init__.py"))
    assert all(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) for path in rooms)
