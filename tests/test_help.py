"""--help of every program: it begins with what the program does and an example, and is there at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_missing_packages import COMMANDS, REPOSITORY, programs

SUBCOMMANDS = {
    "crate_dist.probe": ("knn", "linear"),
    "crate_dist.figures": ("attention", "layers", "pca", "mask", "compare"),
    "crate_dist.models.weights": ("describe", "convert"),
    "launch/status.py": ("list", "results", "logs", "stop", "resume"),
}
MEASURES = "benchmarks/"
"""Begins the programs that import first what they measure."""

ALL = """
import contextlib, io, json, os, runpy, sys
os._exit = sys.exit
sys.path[:0] = ["", "benchmarks"]
asked, said = json.load(sys.stdin), []
for program, *words in asked:
    sys.argv = [program, *words, "--help"]
    run = runpy.run_path if program.endswith(".py") else runpy.run_module
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        run(program, run_name="__main__")
    said.append((out.getvalue(), sorted({"torch", "deepspeed", "matplotlib", "scipy"} & sys.modules.keys())))
print(json.dumps(said))
"""


def asked() -> list[list[str]]:
    """Every program and subcommand; those that may be slow last, since all are called in one process."""
    found = [*programs(), *(f"crate_dist.{name}" for name in (*COMMANDS, "doctor", "config"))]
    found.sort(key=lambda program: (program.startswith(MEASURES), program))
    return [[program, *words] for program in found for words in ((), *((sub,) for sub in SUBCOMMANDS.get(program, ())))]


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple[str, list[str]]]:
    """What each said, and what that had imported."""
    done = subprocess.run(
        [sys.executable, "-c", ALL], cwd=REPOSITORY, input=json.dumps(asked()), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {" ".join(words): said for words, said in zip(asked(), json.loads(done.stdout), strict=True)}


def test_every_help_begins_with_an_example_of_the_program_and_shows_its_options_last(
    helps: dict[str, tuple[str, list[str]]],
) -> None:
    for program, (text, _) in helps.items():
        explained, usage, options = text.partition("\nusage: ")
        assert usage, program
        assert "  -h, --help" in options, program
        name = Path(program.split()[0]).name
        called = "make demo" if name == "demo.py" else " ".join([name, *program.split()[1:]])
        assert f"{called} " in f"{explained} ".replace("\n", " "), program


def test_no_help_waits_for_what_computes(helps: dict[str, tuple[str, list[str]]]) -> None:
    assert {program for program, (_, heavy) in helps.items() if heavy and not program.startswith(MEASURES)} == set()


@pytest.mark.parametrize("program", ["launch/slurm.py", "launch/local.py", "crate_dist.train"])
def test_where_a_recipe_is_asked_for_all_are_listed(helps: dict[str, tuple[str, list[str]]], program: str) -> None:
    for path in (REPOSITORY / "configs").glob("*.toml"):
        assert f"\n  {path.stem} " in helps[program][0]
