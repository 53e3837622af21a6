"""launch/prep.py up to the call of sbatch; on a real cluster: tests/cluster/test_prep.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data_prep import class_tree
from tests.ranks import REPOSITORY


def prep(*arguments: str | Path, path: str = "/nonexistent", site: str | Path = "") -> subprocess.CompletedProcess[str]:
    """Runs it with nothing to be found on its path unless `path` says otherwise, and no torch to be imported."""
    program = str(REPOSITORY / "launch" / "prep.py")
    code = (
        f"import sys, runpy; sys.modules['torch'] = None; sys.argv = {[program, *map(str, arguments)]!r}; "
        f"runpy.run_path({program!r}, run_name='__main__')"
    )
    environment = {**os.environ, "PATH": path, "CRATE_SITE": str(site)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    """What a user types to convert a tree of class folders."""
    source = class_tree(tmp_path_factory.mktemp("images") / "tree")
    return ["--converter", "image_folder", "--source", source, "--out", source.parent / "out", "--parts", "3"]


def test_a_dry_run_looks_at_the_source_and_shows_the_array_and_writes_nothing(given: list[str | Path]) -> None:
    asked = ["--partition", "cpu", "--cpus-per-task", "12", "--time", "2:00:00", "--at-once", "2", "--short-side", "9"]
    done = prep(*given, *asked, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "24 images -> 1 shard" in done.stdout
    assert "--short-side 9 --workers 12 --part 1/3" in done.stdout
    wanted = {"--array=0-2%2", "--partition=cpu", "--cpus-per-task=12", "--time=120", "--requeue", "--signal=USR2@120"}
    assert wanted <= {line.removeprefix("#SBATCH ") for line in done.stdout.splitlines()}
    assert not Path(given[5]).exists()
    assert "--workers=2 --part 1/3" in prep(*given, "--workers=2", "--dry-run").stdout


def test_the_site_file_says_what_every_job_gets_and_options_win(given: list[str | Path], tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text('partition = "gpu"\naccount = "vision"\nexclude = "n3"\nenvironment.https_proxy = "http://proxy"\n')
    lines = prep(*given, "--partition", "cpu", "--setup", "ulimit -n 9", "--dry-run", site=site).stdout.splitlines()
    assert {"#SBATCH --partition=cpu", "#SBATCH --account=vision", "#SBATCH --exclude=n3"} <= set(lines)
    assert lines.index("export https_proxy=http://proxy") < lines.index("ulimit -n 9")


def test_what_is_wrong_is_said_before_anything_is_submitted(given: list[str | Path], tmp_path: Path) -> None:
    assert "no sbatch on this machine" in prep(*given).stderr
    assert f"{given[3]} --out {given[5]} --workers 16 --part 1/3" in prep(*given).stderr
    assert "--source and --parts are needed" in prep("--out", tmp_path).stderr
    assert "--part is given to each job by --parts" in prep(*given, "--part", "1/3").stderr
    assert f"no conversion was begun in {tmp_path}" in prep("--out", tmp_path, "--status").stderr
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho was called >&2\nexit 1\n")
    sbatch.chmod(0o755)
    wrong = prep(*given, "--shortside", "9", path=str(tmp_path))
    assert wrong.returncode == 2
    assert "--shortside" in wrong.stderr
    missing = prep(*given[:3], tmp_path / "nowhere", *given[4:], path=str(tmp_path))
    assert missing.returncode == 1
    assert f"{tmp_path}/nowhere does not exist" in missing.stderr
    assert "was called" not in wrong.stderr + missing.stderr
    refused = prep(*given, path=f"{tmp_path}:/bin")
    assert refused.returncode == 1
    assert "error: sbatch refused the job" in refused.stderr
    pattern = prep(*given[:5], tmp_path / "50%", *given[6:], "--dry-run")
    assert "would read the % in --out" in pattern.stderr
