"""`crate_dist.fit`: trains from Python as the launcher does, and heeds an interrupt as it does."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

import crate_dist
from crate_dist.config import RecipeError, load_recipe


@pytest.mark.spawn
def test_an_interrupt_saves_and_the_same_call_goes_on_to_the_end(
    cast_shards: Path, small_recipe: Path, tmp_path: Path
) -> None:
    run, never = tmp_path / "run", {"log.whitebox_every_steps": 0, "checkpoint.every_steps": 100, "data.workers": 0}
    recipe = load_recipe(small_recipe, [f"{key}={value}" for key, value in never.items()])

    def steps() -> list[int]:
        lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").is_file() else []
        return [json.loads(line)["step"] for line in lines if "train/loss" in line]

    def interrupt() -> None:
        while not steps():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        crate_dist.fit(recipe, cast_shards, run_dir=run)
    assert json.loads((run / "published.json").read_text()), "it ended without a save"
    assert crate_dist.fit(recipe, str(cast_shards), run_dir=str(run)) == run
    assert steps() == list(range(1, 26))
    assert crate_dist.load(run / "model-last.pt").classes == ("0", "1", "2", "3")


def test_what_cannot_be_trained_is_said_in_the_exception(
    cast_shards: Path, small_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RecipeError, match=r"optim\.lr"):
        crate_dist.fit("demo", cast_shards, settings={"optim.learning_rate": 1e-3})
    with pytest.raises(crate_dist.RunFailed, match=rf"^no folder {tmp_path}/nowhere/train.*image_folder.py"):
        crate_dist.fit(small_recipe, tmp_path / "nowhere", run_dir=tmp_path / "run")
    assert f"error: no folder {tmp_path}/nowhere/train" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
