"""The code that runs is the code that was submitted. Of a job that waits and restarts: tests/cluster/."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from crate_dist.run import snapshot
from crate_dist.run.exit_status import NEEDS_A_PERSON
from crate_dist.run.folder import RunFolder
from crate_dist.run.snapshot import START, CodeChanged, Snapshot, check_unchanged, prune
from tests.ranks import REPOSITORY

SAY = """
import multiprocessing, os, subprocess, sys
import crate_dist
VERSION = 1
def say():
    print(VERSION, crate_dist.__file__, flush=True)
if __name__ == "__main__":
    say()
    child = multiprocessing.get_context("spawn").Process(target=say)
    child.start()
    child.join()
    subprocess.run([sys.executable, "-c", "import crate_dist.say; crate_dist.say.say()"])
    print(sys.argv[1:])
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of this clone, with a module that says which code runs in it, in its children, in theirs."""
    clone = tmp_path / "clone"
    for folder in ("crate_dist", "configs", "launch"):
        shutil.copytree(REPOSITORY / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (clone / "crate_dist" / "say.py").write_text(SAY)
    return clone


def run(place: Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    line: list[str | Path] = [sys.executable, place / START, "-u", "-m", "crate_dist.say", "-m", "7"]
    return subprocess.run(line, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)


def git(clone: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(["git", *who, *arguments], cwd=clone, check=True, capture_output=True, text=True).stdout


def test_a_snapshot_runs_whatever_lies_around_it_and_becomes_of_the_clone(clone: Path, tmp_path: Path) -> None:
    place = Snapshot.take(clone).write(tmp_path / "run: 1" / "code")
    text = (clone / "crate_dist" / "say.py").read_text()
    (clone / "crate_dist" / "say.py").write_text(text.replace("VERSION = 1", "VERSION = 2"))
    (clone / "crate_dist" / "run" / "exit_status.py").write_text("nonsense")
    done = run(place, cwd=clone, PYTHONPATH=str(clone))
    # With a colon in it a path cannot be on PYTHONPATH, for what the rank starts by -c.
    assert done.stdout.splitlines()[:2] == [f"1 {place}/crate_dist/__init__.py"] * 2, done.stderr
    place = Snapshot.take(clone).write(tmp_path / "code")
    assert "nonsense" in run(place, cwd=tmp_path).stderr
    shutil.copy(REPOSITORY / "crate_dist/run/exit_status.py", clone / "crate_dist/run")
    place = Snapshot.take(clone).write(tmp_path / "code")
    done = run(place, cwd=REPOSITORY, PYTHONPATH=str(REPOSITORY))
    assert done.stdout.splitlines() == [f"2 {place}/crate_dist/__init__.py"] * 3 + ["['-m', '7']"], done.stderr


def test_code_that_is_loaded_from_elsewhere_is_refused(clone: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    early = f"import sys\nsys.path.insert(0, {str(clone)!r})\nimport crate_dist\n"
    (tmp_path / "site" / "sitecustomize.py").write_text(early)
    place = Snapshot.take(clone).write(tmp_path / "code")
    done = run(place, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"), SLURM_PROCID="3")
    assert done.returncode == NEEDS_A_PERSON
    assert done.stdout.startswith("crate-dist fault: rank 3: the run was started with the code in ")
    assert f"{place}, and Python loads that in {clone} instead" in done.stdout


def test_a_snapshot_that_was_altered_is_refused(clone: Path, tmp_path: Path) -> None:
    place = Snapshot.take(clone).write(tmp_path / "code")
    check_unchanged(place)
    with (place / "crate_dist" / "say.py").open("a") as file:
        file.write("print('mine')\n")
    done = run(place, cwd=tmp_path)
    assert done.returncode == NEEDS_A_PERSON
    assert "is not what was submitted: it was changed, or is not whole; the same command, given again" in done.stdout
    assert "mine" not in done.stdout


def _plant_compiled(place: Path) -> None:
    (place / "crate_dist" / "__pycache__").mkdir()
    (place / "crate_dist" / "__pycache__" / "say.cpython-311.pyc").write_bytes(b"mine")


def _plant_link(place: Path) -> None:
    shutil.copy(place / "crate_dist" / "say.py", place.parent / "elsewhere.py")
    (place / "crate_dist" / "say.py").unlink()
    (place / "crate_dist" / "say.py").symlink_to(place.parent / "elsewhere.py")


@pytest.mark.parametrize(
    "plant",
    [
        lambda place: (place / "crate_dist" / "say.py").write_text("mine"),
        lambda place: (place / "crate_dist" / "say.so").write_text("mine"),
        lambda place: (place / "crate_dist" / "say.py").unlink(),
        _plant_compiled,
        _plant_link,
    ],
)
def test_what_another_has_left_under_the_name_of_this_code_is_not_run(
    plant: Callable[[Path], object], clone: Path, tmp_path: Path
) -> None:
    taken = Snapshot.take(clone)
    place = taken.write(tmp_path / "code")
    plant(place)
    assert taken.write(tmp_path / "code") == place
    found = {path.relative_to(place).as_posix(): path for path in place.rglob("*") if path.is_file()}
    assert {name: path.read_bytes() for name, path in found.items()} == taken.files
    assert not any(path.is_symlink() for path in found.values())


def test_a_folder_that_is_a_link_is_not_written_through(clone: Path, tmp_path: Path) -> None:
    (tmp_path / "code").symlink_to(tmp_path)
    with pytest.raises(CodeChanged, match="is a symbolic link"):
        Snapshot.take(clone).write(tmp_path / "code")


def test_commit_and_diff_make_the_code_again(clone: Path, tmp_path: Path) -> None:
    git(clone, "init", "--quiet")
    git(clone, "add", "crate_dist", "configs", "launch")
    git(clone, "commit", "--quiet", "--message", "all")
    clean = Snapshot.take(clone)
    commit = git(clone, "rev-parse", "HEAD").strip()
    assert json.loads(clean.files["version.json"]) == {"commit": commit, "changed": False}
    assert "changes.diff" not in clean.files

    (clone / "crate_dist" / "job.py").write_text("changed\n")
    (clone / "launch" / "local.py").write_text("changed too\n")
    (clone / "crate_dist" / "say.py").rename(clone / "crate_dist" / "said.py")
    status = git(clone, "status", "--porcelain")
    changed = Snapshot.take(clone)
    assert git(clone, "status", "--porcelain") == status
    about = json.loads(changed.files["version.json"])
    assert (about["commit"], about["changed"], len(about["diff"])) == (commit, True, 32)
    git(clone, "worktree", "add", "--quiet", str(tmp_path / "again"), commit)
    subprocess.run(["git", "apply"], cwd=tmp_path / "again", input=changed.files["changes.diff"], check=True)
    assert Snapshot.take(tmp_path / "again").files.keys() == changed.files.keys()
    for name in ("crate_dist/job.py", "crate_dist/said.py"):
        assert (tmp_path / "again" / name).read_bytes() == changed.files[name]
    assert (tmp_path / "again/launch/local.py").read_text() == "changed too\n"


def test_a_clone_that_is_too_much_to_keep_is_refused(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (clone / "crate_dist" / "weights.bin").write_bytes(bytes(3_000_000))
    monkeypatch.setattr(snapshot, "_MOST_BYTES", 2_000_000)
    with pytest.raises(CodeChanged, match=r"at most 2 MB: crate_dist/weights.bin alone is 3.0; move it elsewhere"):
        Snapshot.take(clone)


def test_snapshots_that_no_start_has_used_go_and_nothing_else(clone: Path, tmp_path: Path) -> None:
    code = tmp_path / "code"
    names = []
    for text in ("1", "2", "3"):
        (clone / "configs" / "mine.toml").write_text(text)
        names.append(Snapshot.take(clone).write(code).name)
    (code / "notes").mkdir()
    prune(code, {names[0], names[2]})
    assert sorted(path.name for path in code.iterdir()) == sorted([names[0], names[2], "notes"])


def test_a_local_run_notes_its_code_and_that_it_has_changed(
    clone: Path, small_recipe: Path, cast_shards: Path, tmp_path: Path
) -> None:
    line: list[str | Path] = [
        sys.executable,
        clone / "launch" / "local.py",
        "--config",
        small_recipe,
        "--data",
        cast_shards,
    ]
    line += ["--ranks", "1", "--run-dir", tmp_path / "run", "--set", "log.eval_every_epochs=9"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for steps in ("2", "4"):
        few = ["--set", f"train.max_steps={steps}"]
        done = subprocess.run([*line, *few], env=environment, cwd=clone, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        (clone / "crate_dist" / "say.py").write_text(f"# after {steps}")
    folder = RunFolder(tmp_path / "run")
    starts = json.loads(folder.record_file.read_text())["starts"]
    first, second = (start["snapshot"] for start in starts)
    assert first != second
    assert sorted(path.name for path in folder.code.iterdir()) == sorted([first, second])
    assert f"with other code than before: snapshot {first[:10]} -> snapshot {second[:10]}" in done.stderr
    assert json.loads(folder.record_file.read_text())["code"]["packages"]["torch"]
