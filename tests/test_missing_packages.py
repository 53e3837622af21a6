"""A program that is run with a Python that lacks its packages says so in a line, and what would do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
COMMANDS = ("train", "evaluate", "probe", "figures", "models.weights")


def programs() -> list[str]:
    """All that are run by path."""
    paths = [path for folder in ("launch", "data_prep", "benchmarks") for path in (REPOSITORY / folder).glob("*.py")]
    return sorted(str(path.relative_to(REPOSITORY)) for path in paths if "__main__" in path.read_text(encoding="utf-8"))


def run_bare(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """With the standard library alone: -S leaves out all that is installed, -E what PYTHONPATH names."""
    return subprocess.run([sys.executable, "-S", "-E", *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("arguments", [*([p] for p in programs()), *(["-m", f"crate_dist.{c}"] for c in COMMANDS)])
def test_a_bare_python_is_told_what_to_install_in_one_line(arguments: list[str], tmp_path: Path) -> None:
    by_path = arguments[0] != "-m"
    done = run_bare(
        *(str(REPOSITORY / a) if by_path else a for a in arguments), cwd=tmp_path if by_path else REPOSITORY
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert f"is not installed for {sys.executable}" in done.stderr
    assert str(REPOSITORY) in done.stderr
    assert all(remedy in done.stderr for remedy in ("make setup", "source .venv/bin/activate", "pip install -e ."))


def test_a_module_that_another_program_misses_keeps_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        f"import sys\nsys.path.append({str(REPOSITORY)!r})\nimport crate_dist\nimport no_such\n"
    )
    done = run_bare("mine.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "No module named 'no_such'" in done.stderr
