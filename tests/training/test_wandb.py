"""What Weights & Biases gets of a run is one curve with every step once, whatever became of the starts before."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crate_dist.config import load_recipe
from crate_dist.run.folder import RunFolder
from crate_dist.training.wandb_run import WandbRun, arrived, on_disk, sent

pytest.importorskip("wandb")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run's, of somebody who is not logged in."""
    for variable in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(variable)
    for variable, place in {"HOME": "home", "NETRC": "home/netrc", "WANDB_CONFIG_DIR": "home", "TMPDIR": ""}.items():
        monkeypatch.setenv(variable, str(tmp_path / place))
    folder = RunFolder(tmp_path / "run")
    folder.open(load_recipe("demo"))
    return folder


def start(folder: RunFolder, lines: list[dict[str, Any]], steps: range, restarts: int = 0) -> list[dict[str, Any]]:
    """One start of a run that reports every step, measures its layers at even ones, and saves them two steps later."""
    run = WandbRun(folder, load_recipe("demo"), lines)
    made: list[dict[str, Any]] = []
    if restarts:
        run.scalars({"run/restarts": restarts}, steps[0])
    for step in steps:
        loss = {"train/loss": 1 / step, "train/lr": 0.1}
        run.scalars({**loss, "images_per_s/rank-00000": 5.0}, step)
        made.append({"step": step, **loss, "time": 1e9 + step})
        if step % 2 == 0:
            run.layers("whitebox/zeros", [step / 10, step / 20], step)
            run.picture("whitebox/attention", np.full((4, 6, 3), step, np.uint8), step)
            made.append({"step": step, "whitebox/zeros": [step / 10, step / 20], "time": 1e9 + step})
        if step > steps[0] + 2:
            run.scalars({"checkpoint/stall_s": 0.5}, step - 2)
    run.close()
    return lines + made


def points(folder: RunFolder) -> dict[str, list[int]]:
    """Name -> the steps of all that was sent, in their order, of all starts."""
    found: dict[str, list[int]] = {}
    for path in sorted(folder.wandb.glob("offline-run-*/*.wandb")):
        for name, step in sent(path):
            found.setdefault(name, []).append(step)
    return found


def test_a_requeued_run_goes_on_in_the_same_curve_and_no_step_is_sent_twice(
    folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    lines = start(folder, [], range(1, 41))
    (first,) = folder.wandb.glob("offline-run-*/*.wandb")
    first.write_bytes(first.read_bytes()[:-9000])  # what a node that lost its power had not written
    cut = max(points(folder)["train/loss"])
    assert 20 < cut < 40
    kept = [line for line in lines if line["step"] <= 20]
    with caplog.at_level("INFO"):
        start(folder, kept, range(21, 46), restarts=1)
    assert f"`wandb sync {folder.wandb}` sends it" in caplog.text
    assert {path.name for path in folder.wandb.glob("offline-run-*/*.wandb")} == {first.name}  # one id
    assert json.loads(folder.record_file.read_text())["id"] in first.name
    found = points(folder)
    assert found["train/loss"] == found["train/lr"] == found["images_per_s/rank-00000"] == [*range(1, 46)]
    assert found["whitebox/zeros/layer-02"] == found["whitebox/attention"] == [*range(2, 46, 2)]
    assert found["run/restarts"] == [21]
    assert Counter(found["checkpoint/stall_s"]).most_common(1)[0][1] == 1


def test_a_run_that_gets_wandb_later_or_lost_what_it_had_sends_its_whole_curve(folder: RunFolder) -> None:
    lines = [{"step": step, "train/loss": 1.0, "time": 1e9} for step in range(1, 6)]
    start(folder, [*lines, {"step": 4, "whitebox/zeros": [0.5, 0.25], "time": 1e9}], range(6, 8))
    found = points(folder)
    assert found["train/loss"] == [*range(1, 8)]
    assert found["whitebox/zeros/layer-01"] == [4, 6]
    assert "time" not in found


def test_a_file_damaged_in_the_middle_is_cut_there_and_what_it_had_is_sent_again(folder: RunFolder) -> None:
    lines = start(folder, [], range(1, 21))
    (first,) = folder.wandb.glob("offline-run-*/*.wandb")
    data = bytearray(first.read_bytes())
    data[len(data) // 2] ^= 1
    first.write_bytes(data)
    assert 3 < max(points(folder)["train/loss"]) < 17
    start(folder, lines, range(21, 23))
    assert len(data) * 0.4 < first.stat().st_size < len(data) // 2
    assert points(folder)["train/loss"] == [*range(1, 23)]
    assert points(folder)["whitebox/zeros/layer-02"] == [*range(2, 23, 2)]


def test_an_online_run_goes_on_behind_what_the_server_has_of_every_curve(folder: RunFolder) -> None:
    import wandb

    run = WandbRun(folder, load_recipe("demo"))
    run.scalars({"train/loss": 1.0, "val/top1": 0.5}, 8)
    run.scalars({"train/loss": 0.9}, 16)  # and killed in the evaluation of this step
    assert wandb.run
    summary = dict(wandb.run.summary)
    assert summary["step"]["max"] == 16
    known = arrived(summary)
    assert (known["train/loss"], known["val/top1"]) == (16, 8)
    run.close()
    older = {"train/loss": 0.9, "val/top1": 0.5, "step": {"max": 16}}  # a summary without the steps of each curve
    assert arrived(older)["val/top1"] == 15

    run_id = json.loads(folder.record_file.read_text())["id"]
    (file,) = folder.wandb.glob("offline-run-*/*.wandb")
    assert on_disk(folder.wandb, run_id)["train/loss"] == 16
    online = file.parent.rename(folder.wandb / file.parent.name.removeprefix("offline-")) / file.name
    assert on_disk(folder.wandb, run_id) == {}  # the server may have less
    online.with_suffix(".wandb.synced").touch()
    assert on_disk(folder.wandb, run_id)["val/top1"] == 8


def test_a_file_with_nothing_whole_in_it_does_not_stand_in_the_way_of_the_others(folder: RunFolder) -> None:
    start(folder, [], range(1, 3))
    (first,) = folder.wandb.glob("offline-run-*/*.wandb")
    first.write_bytes(first.read_bytes()[:7] + bytes(500))
    start(folder, [], range(1, 4))
    assert not first.exists()
    assert points(folder)["train/loss"] == [1, 2, 3]


def test_trouble_with_wandb_is_said_once_and_training_goes_on(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    start(folder, [], range(1, 9))
    assert caplog.text.count("goes on without it") == 1
