"""The house: no import runs from a lower floor to a higher one, and none runs in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "crate_dist"
COMMANDS = ("train", "evaluate", "probe", "figures", "models.weights")
FLOOR = re.compile(r"^(\d+)  (\w+(?:  ?\w+)*)   ", re.MULTILINE)


def floors() -> dict[str, int]:
    """Room or module -> its floor, as docs/design.md draws it."""
    drawn = FLOOR.findall((REPOSITORY / "docs" / "design.md").read_text(encoding="utf-8"))
    return {name: int(number) for number, names in drawn for name in names.split()}


def imports(folder: Path = PACKAGE) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, anywhere in it; names without "crate_dist."."""
    known = {_name(path) for path in PACKAGE.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for path in folder.rglob("*.py"):
        ours = found[_name(path) if folder == PACKAGE else path.name] = set[str]()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path} has a relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Constant) and re.fullmatch(r"crate_dist(\.\w+)+", str(node.value)):
                names = [str(node.value)]  # for importlib, or for `python -m`
                if folder != PACKAGE or names[0].removeprefix("crate_dist.") in COMMANDS:
                    continue
            else:
                continue
            inside = (name.removeprefix("crate_dist.") for name in names if name.startswith("crate_dist."))
            ours |= {name if name in known else name.rpartition(".")[0] for name in inside} - {""}
    return found


def _name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def test_every_room_is_in_the_picture_and_the_picture_has_no_other() -> None:
    assert {module.partition(".")[0] for module in imports() if module} == floors().keys()
    assert rooms(imports()[""]) == {"api"}  # the package's own face, which shows it when it is asked to


def test_every_import_runs_down_or_stays_in_its_room() -> None:
    floor = {**floors(), "": 9}
    for module, others in imports().items():
        room = module.partition(".")[0]
        for other in others:
            there = other.partition(".")[0]
            assert there == room or floor[there] < floor[room] or floor[there] == floor[room] == 1, (module, other)


def test_no_import_runs_in_a_circle() -> None:
    order = list(TopologicalSorter({module: others - {module} for module, others in imports().items()}).static_order())
    assert len(order) > 50


def test_what_prepares_data_and_what_trains_know_nothing_of_each_other() -> None:
    everywhere = imports() | imports(REPOSITORY / "launch")
    known_by = {room for module, others in everywhere.items() if "prep" in rooms(others) for room in rooms([module])}
    assert known_by <= {"prep", "doctor"}  # the latter makes the shards that it trains on
    for program, others in imports(REPOSITORY / "data_prep").items():
        assert all(floors()[room] < floors()["checkpoint"] for room in rooms(others)), program


def rooms(modules: Iterable[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def test_every_room_says_in_its_docstring_what_it_is_for() -> None:
    folders = list(PACKAGE.rglob("__init__.py"))
    assert all(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) for path in folders)
