"""What was made before the modules moved still works: shards, a run that kill -9 ended, an export."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.data_prep import run as run_program
from tests.ranks import REPOSITORY, train_to_the_end

STORED = Path(__file__).parent / "stored_run"
FIRST, LAST = 9, 12
"""Steps that are yet to be made, as the newest checkpoint is of the step before; two of them were made and lost."""
TOLERANCE = 1e-5

Lines = dict[int, dict[str, Any]]


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A copy that may be written to."""
    return Path(shutil.copytree(STORED, tmp_path / "stored"))


def lines(path: Path, key: str) -> Lines:
    """The lines of a metrics.jsonl that have a key, by step; fails where a step has two of them."""
    found = [line for line in map(json.loads, path.read_text().splitlines()) if key in line]
    assert len({line["step"] for line in found}) == len(found), f"{path} has a step twice"
    return {line["step"]: line for line in found}


def command(module: str, *arguments: object) -> str:
    """What `python -m module …` prints; fails the test when it fails."""
    line = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.spawn
@pytest.mark.parametrize("world_size", [2, 1])
def test_a_run_goes_on_as_if_nothing_had_happened(stored: Path, world_size: int) -> None:
    """On one rank too: gradients that are summed in another order differ in their seventh digit, of which Lion takes
    the sign alone. A weight in 100,000 whose sign it is moves the loss by a millionth."""
    run = stored / "run"
    before = lines(run / "metrics.jsonl", "train/loss")
    train_to_the_end(["--config", run / "recipe.toml", "--data", stored / "shards", "--run-dir", run], world_size)

    steps = lines(run / "metrics.jsonl", "train/loss")
    assert list(steps) == list(range(1, LAST + 1))
    assert all(steps[step] == before[step] for step in range(1, FIRST)), "steps that count were written anew"
    undisturbed = STORED / "undisturbed.jsonl"
    for key in ("train/loss", "train/grad_norm", "train/lr", "val/loss", "val/top1", "whitebox/coding_rate"):
        here, there = lines(run / "metrics.jsonl", key), lines(undisturbed, key)
        assert list(here) == list(there)
        for step in there:
            assert here[step][key] == pytest.approx(there[step][key], rel=TOLERANCE), f"{key} of step {step}"

    assert [start["step"] for start in json.loads((run / "run.json").read_text())["starts"]] == [0, FIRST - 1]
    assert json.loads((run / "published.json").read_text()) == {"step": LAST}
    curves = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    curves.Reload()
    shown = [(event.step, pytest.approx(event.value)) for event in curves.Scalars("train/loss")]
    assert shown == [(step, line["train/loss"]) for step, line in steps.items()]


@pytest.mark.parametrize("model", ["run", "model-best.pt"])
def test_a_checkpoint_and_an_export_have_the_accuracy_that_they_had(stored: Path, model: str) -> None:
    found = stored / "found.json"
    command("crate_dist.evaluate", stored / model, "--data", stored / "shards", "--json", found)
    said, expected = json.loads(found.read_text()), json.loads((STORED / "evaluations.json").read_text())[model]
    assert {key: said[key] for key in expected} == pytest.approx(expected, rel=TOLERANCE)


def test_an_export_is_described() -> None:
    said = command("crate_dist.models.weights", "describe", STORED / "model-best.pt").splitlines()
    expected = "kind crate-dist, image_size 8, patch_size 4, num_classes 3, dim 8, depth 2, heads 2, parameters 1,059"
    expected += ", recipe stored, step 8, precision fp32"
    assert not set(expected.split(", ")) - {" ".join(line.split()) for line in said}


def test_shards_are_what_their_index_says() -> None:
    done = run_program("verify.py", STORED / "shards", "--images")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all sound") == 2, done.stdout
