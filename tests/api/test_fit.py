"""`crate_dist.fit`: trains from Python as the launcher does, and heeds an interrupt as it does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

import crate_dist
from crate_dist.config import RecipeError, load_recipe

NAMES = ("red", "green", "blue", "grey")


def named(shards: Path, copy: Path) -> Path:
    """A copy of shards whose classes have names for people."""
    shutil.copytree(shards, copy)
    for index in copy.glob("*/index.json"):
        index.write_text(json.dumps({**json.loads(index.read_text()), "class_names": NAMES}))
    return copy


@pytest.mark.spawn
def test_an_interrupt_saves_before_it_ends_the_training(
    cast_shards: Path, small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the same call goes on from there is seen by the pages' own training, in tests/test_docs.py."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    settings = {"log.whitebox_every_steps": 0, "checkpoint.every_steps": 1000, "data.workers": 0, "train.epochs": 1000}
    recipe = load_recipe(small_recipe, [f"{key}={value}" for key, value in settings.items()])

    def interrupt() -> None:
        while not (metrics.is_file() and metrics.stat().st_size):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        crate_dist.fit(recipe, named(cast_shards, tmp_path / "shards"), run_dir=run)
    model = crate_dist.load(run)
    assert (model.classes, model.class_names) == (("0", "1", "2", "3"), NAMES)
    assert model.name.startswith(f"{run}/checkpoints/step-")


def test_what_cannot_be_trained_is_said_in_the_exception(
    cast_shards: Path, small_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RecipeError, match=r"optim\.lr"):
        crate_dist.fit("demo", cast_shards, settings={"optim.learning_rate": 1e-3})
    with pytest.raises(RecipeError, match=r"train\.max_steps is None; leave out"):
        crate_dist.fit("demo", cast_shards, settings={"train.max_steps": None})
    with pytest.raises(crate_dist.RunFailed, match=rf"^no folder {tmp_path}/nowhere/train.*image_folder.py"):
        crate_dist.fit(small_recipe, tmp_path / "nowhere", run_dir=tmp_path / "run")
    assert f"error: no folder {tmp_path}/nowhere/train" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
