"""The demo takes the ranks that the machine has GPUs for; what it leaves goes by `make clean`, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from launch.demo import IMAGES, RUN, SHARDS, ranks
from tests.ranks import REPOSITORY


def test_clean_removes_what_the_demo_wrote_and_no_more(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    kept = ["demo/mine.txt", "runs/demo-2/recipe.toml", "runs/demolition/recipe.toml", ".venv/pyvenv.cfg"]
    for path in [tmp_path / name for name in (*kept, *(f"{folder}/some/file" for folder in (IMAGES, SHARDS, RUN)))]:
        path.parent.mkdir(parents=True)
        path.touch()
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*kept, "Makefile"}


@pytest.mark.parametrize(("gpus", "expected"), [("", 2), ("0", 1), ("0,1", 2), ("0,1,2,3", 2)])
def test_one_gpu_alone_is_for_one_rank(
    gpus: str, expected: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    assert ranks() == expected
    assert ("this machine has one GPU" in capsys.readouterr().out) == (expected == 1)
