"""What `make demo` leaves goes by `make clean`, and nothing else does."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from launch.demo import IMAGES, RUN, SHARDS
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
