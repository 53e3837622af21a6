"""The run folder: one run, one folder, and no silent mixture of two."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from crate_dist.config import RecipeError, load_recipe
from crate_dist.files import write_whole
from crate_dist.run.folder import RunFolder, read_recipe
from crate_dist.run.lock import LostTheRun, RunLock


def test_a_run_folder_knows_its_recipe_and_its_starts(tmp_path: Path) -> None:
    recipe = load_recipe("demo", ["train.seed=5"])
    folder = RunFolder(tmp_path / "new" / "run")
    folder.open(recipe)
    assert read_recipe(folder.path) == recipe
    assert [folder.record.note_start(step=step) for step in (0, 40)] == [0, 1]
    record = json.loads(folder.record_file.read_text())
    assert [start["step"] for start in record["starts"]] == [0, 40]
    assert set(record["code"]) == {"commit", "changed", "python", "packages"}


def test_a_run_is_opened_again_with_other_means_to_the_same_end(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open(load_recipe("demo"))
    folder.record.note_start(step=0)
    folder.open(load_recipe("demo", ["data.workers=3", "train.micro_batch=4", "cluster.nodes=2"]))
    assert read_recipe(folder.path).data.workers == 3
    assert len(json.loads(folder.record_file.read_text())["starts"]) == 1


def test_a_run_of_another_recipe_is_refused_with_what_differs(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open(load_recipe("demo"))
    folder.metrics.write_text('{"step": 1}\n')
    with pytest.raises(RecipeError, match=r"train.seed: 0 there, 1 now(.|\n)*another --run-dir"):
        folder.open(load_recipe("demo", ["train.seed=1"]))
    assert read_recipe(folder.path).train.seed == 0


def test_a_folder_in_which_no_step_was_ever_made_takes_another_recipe_and_loses_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open(load_recipe("demo"))
    folder.record.note_start(step=0)
    folder.open(load_recipe("demo", ["train.seed=1"]))
    assert read_recipe(folder.path).train.seed == 1
    assert json.loads(folder.record_file.read_text())["starts"] == []
    (before,) = folder.path.glob("failed-start-*")
    assert len(json.loads((before / "run.json").read_text())["starts"]) == 1
    folder.published.write_text('{"step": 5}\n')
    with pytest.raises(RecipeError, match=r"train.seed: 1 there, 2 now"):
        folder.open(load_recipe("demo", ["train.seed=2"]))


def test_a_launcher_that_has_lost_the_folder_changes_nothing_in_it(tmp_path: Path) -> None:
    def lost() -> None:
        raise LostTheRun("another one has it")

    folder = RunFolder(tmp_path / "run")
    folder.open(load_recipe("demo"))
    before = sorted(path.name for path in folder.path.iterdir())
    changes: list[Callable[[], object]] = [
        lambda: folder.set_aside(lost),
        lambda: folder.open(load_recipe("demo", ["train.seed=1"]), lost),
        lambda: folder.open(load_recipe("demo", ["data.workers=3"]), lost),
        lambda: folder.record.note_start(lost, step=0),
    ]
    for change in changes:
        with pytest.raises(LostTheRun):
            change()
    assert sorted(path.name for path in folder.path.iterdir() if "-start-" not in path.name) == before
    assert read_recipe(folder.path) == load_recipe("demo")


def test_a_run_folder_that_is_a_link_is_set_aside_beside_what_it_points_to(tmp_path: Path) -> None:
    RunFolder(tmp_path / "elsewhere" / "run").open(load_recipe("demo"))
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "run").symlink_to(tmp_path / "elsewhere" / "run")
    RunFolder(tmp_path / "here" / "run").set_aside()
    (before,) = (tmp_path / "elsewhere").glob("run.before-*")
    assert read_recipe(before) == load_recipe("demo")


def test_a_run_is_set_aside_whole_and_its_lock_stays(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open(load_recipe("demo"))
    (folder.checkpoints / "step-00000005").mkdir()
    with RunLock(folder.lock) as lock:
        aside = folder.set_aside()
        lock.check()
        assert [path.name for path in folder.path.iterdir()] == ["lock"]
        assert folder.set_aside() is None
    (before,) = tmp_path.glob("run.before-*")
    assert aside == before
    assert read_recipe(before) == load_recipe("demo")
    assert (before / "checkpoints" / "step-00000005").is_dir()
    (folder.path / "thesis.tex").write_text("")
    with pytest.raises(RecipeError, match="sets only runs aside"):
        folder.set_aside()


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RecipeError, match=r"no run \(thesis.tex\)"):
        RunFolder(tmp_path).open(load_recipe("demo"))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(RecipeError, match="is a file"):
        RunFolder(tmp_path / "thesis.tex").open(load_recipe("demo"))
    with pytest.raises(RecipeError, match="is no run folder"):
        read_recipe(tmp_path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new\ud800")
    assert path.read_text() == "old"
    write_whole(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
