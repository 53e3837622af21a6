"""The report at the end of a run: from its folder alone, with why it was started again and what to type next."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from crate_dist.run.folder import RunFolder
from crate_dist.run.rank_logs import restarts
from crate_dist.watching.report import report
from tests.ranks import REPOSITORY


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run on which two ranks made ten of twelve steps, as an older version left it."""
    return RunFolder(Path(shutil.copytree(REPOSITORY / "tests" / "stored_run" / "run", tmp_path / "run")))


def note(folder: RunFolder, event: str, at: float, **facts: object) -> None:
    with folder.ledger.open("a") as file:
        file.write(json.dumps({"event": event, "time": at, "up_s": 1.0, **facts}) + "\n")


def log(folder: RunFolder, rank: int, at: float, text: str) -> None:
    folder.logs.mkdir(exist_ok=True)
    with folder.log_file(rank).open("a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(at))} {text}\n")


def test_each_restart_has_its_reason(folder: RunFolder) -> None:
    began = json.loads(folder.ledger.read_text().splitlines()[0])["time"]
    log(folder, 0, began + 90, "E SAVING FAILED (1 of at most 3 in a row)")
    log(folder, 0, began + 101, "E rank 0 has lost another rank, which says why")
    log(folder, 1, began + 100, "E no space left on device")
    note(folder, "start", began + 200, step=8)
    note(folder, "end", began + 210)
    note(folder, "start", began + 310, step=9)
    note(folder, "steps", began + 320, after=9, step=10, busy_s=1.0, wait_s=0.0)
    note(folder, "start", began + 400, step=9)
    found = restarts(folder)
    assert [(one.step, one.why) for one in found] == [
        (8, "rank 1: no space left on device"),
        (9, "told to stop"),
        (9, "killed, or its machine was lost"),
    ]
    assert found[1].away_s == pytest.approx(99)

    said = report(folder)
    assert "\n  restarts    3, 3 steps made twice\n" in said
    for one in found:
        assert f"at step {one.step}, {time.strftime('%a %H:%M', time.localtime(one.at))}: {one.why}\n" in said


def test_a_run_that_stopped_is_reported_with_what_it_has_and_how_it_goes_on(folder: RunFolder) -> None:
    lines = report(folder).splitlines()
    assert lines[0] == f"{folder.path}: STOPPED"
    facts = {line[2:14].strip(): line[14:] for line in lines[1:] if line[2] != " "}
    assert facts["top-1"] == "55.56 % at step 8, the best, top-5 100.00 %, loss 1.0749"
    assert facts["steps"].startswith("10 of 12, ")
    assert facts["goodput"] == "23 %   steps that count"
    assert facts["restarts"] == "none, 0 steps made twice"
    assert facts["next"].endswith(f"python launch/status.py resume {folder.path}")
    shares = [float(line.split()[0]) for line in lines if line.startswith(" " * 14) and " %" in line[:22]]
    assert sum(shares) + 23 == pytest.approx(100, abs=1.5)


def test_a_run_that_is_complete_is_reported_with_its_weights_and_what_they_are_for(folder: RunFolder) -> None:
    with folder.metrics.open("a") as file:
        file.write(json.dumps({"step": 12, "train/loss": 1.0, "train/epoch": 6.0}) + "\n")
    for which in ("last", "best"):
        folder.model(which).touch()
    said = report(folder)
    assert said.startswith(f"{folder.path}: DONE\n")
    for expected in (folder.model("best"), folder.checkpoints, f"python -m crate_dist.evaluate {folder.path}\n"):
        assert str(expected) in said


def test_what_takes_much_of_the_time_is_told_with_what_would_do(folder: RunFolder) -> None:
    began = json.loads(folder.ledger.read_text().splitlines()[-1])["time"]
    note(folder, "steps", began + 100, after=10, step=11, busy_s=80.0, wait_s=60.0)
    with folder.ledger.open("a") as file:
        file.write(json.dumps({"event": "end", "time": began + 100, "up_s": 102.9}) + "\n")
    assert "waiting for data: more data.workers help" in report(folder)
