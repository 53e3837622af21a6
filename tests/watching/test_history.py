"""What is read from the ends of growing files is what the whole of them says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from crate_dist.files import lines_backwards, whole_lines
from crate_dist.run.folder import RunFolder
from crate_dist.watching.history import Values, fault_of, last_step, last_warning, newest_values, seconds_left

STEPS_PER_EPOCH, BATCH = 12.5, 24


@pytest.mark.parametrize("block", [1, 2, 7, 1 << 16])
@pytest.mark.parametrize(
    "text", ["", "\n", "one\n", "one", "one\n\ntwo\nthr", "a long line\n" * 50, "ä\n" * 9 + "half", "no newline" * 9]
)
def test_lines_backwards_are_the_whole_lines(text: str, block: int, tmp_path: Path) -> None:
    (path := tmp_path / "lines").write_text(text)
    assert list(lines_backwards(path, block=block)) == whole_lines(path)[::-1]
    end = list(lines_backwards(path, at_most=20, block=block))
    assert end == whole_lines(path)[::-1][: len(end)]


def test_of_a_file_that_is_not_there_there_are_no_lines(tmp_path: Path) -> None:
    assert not list(lines_backwards(tmp_path / "none"))


def report(step: int) -> dict[str, Any]:
    """A line of metrics.jsonl, as Monitor.report writes it."""
    epoch = step / STEPS_PER_EPOCH
    speed = {"speed/images_per_s": 100.0 + step, "speed/data_wait_fraction": 0.25}
    return {"step": step, "train/loss": 1 / step, "train/epoch": epoch, **speed}


def write(path: Path, *lines: dict[str, Any], end: str = "") -> RunFolder:
    """Writes lines of JSON, and the run folder in which they lie."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return RunFolder(path.parent)


def test_the_newest_values_are_found_behind_long_and_damaged_lines(tmp_path: Path) -> None:
    lines = [report(step) for step in range(1, 31)]
    lines.insert(10, {"step": 10, "val/top1": 61.0})
    lines.insert(22, {"step": 20, "val/top1": 55.5})
    long = {"step": 30, "whitebox/coding_rate": [0.123456789] * 20000}
    folder = write(tmp_path / "metrics.jsonl", *lines, long, end='no JSON\n[1]\n{"step": 31, "train/lo')
    values = newest_values(folder, BATCH, {})
    assert (values.step, values.loss, values.images_per_s) == (30, 1 / 30, 130.0)
    assert (values.top1, values.best_top1, values.best_step) == (55.5, 61.0, 10)
    assert values.samples == 300
    assert last_step(300, {"train": {"epochs": 3, "global_batch": BATCH}}) == 38  # 37.5, rounded up
    assert last_step(300, {"train": {"epochs": 3, "global_batch": BATCH, "max_steps": 7}}) == 7


def test_what_was_evaluated_before_the_newest_checkpoint_is_read_from_that(tmp_path: Path) -> None:
    """So that no more of the metrics is read than was written since; here the lines before are no metrics at all."""
    metrics = tmp_path / "metrics.jsonl"
    folder = write(metrics, {"step": 3, "val/top1": 99.0}, report(20), report(21), {"step": 21, "val/top1": 30.0})
    saved = {"step": 20, "best_top1": 40.0, "best_step": 10, "metrics": {"val/top1": 35.0}}
    values = newest_values(folder, BATCH, saved)
    assert (values.top1, values.best_top1, values.best_step) == (30.0, 40.0, 10)
    values = newest_values(write(metrics, report(20), report(21)), BATCH, saved)
    assert (values.step, values.top1, values.best_top1) == (21, 35.0, 40.0)


def test_the_time_left_has_the_evaluations_and_saves_in_it(tmp_path: Path) -> None:
    """1 s a step, save or measure included, and 10 s at the end of each epoch of 10 steps."""
    events: list[dict[str, Any]] = [{"event": "start", "step": 0}]
    events += [{"event": "steps", "after": 0, "step": 5, "busy_s": 300.0}]  # compiling
    for step in range(10, 55, 5):
        events += [{"event": "steps", "after": step - 5, "step": step, "busy_s": 4.0}]
        events += [{"event": "save", "step": step, "stall_s": 0.5}, {"event": "whitebox", "step": step, "seconds": 0.5}]
        events += [{"event": "evaluation", "step": step, "seconds": 10.0}] if step % 10 == 0 else []
    folder = write(tmp_path / "ledger.jsonl", *events, end='{"event": "st')
    values = Values(step=50, steps_per_epoch=10.0)
    assert seconds_left(folder, values, 100, 1) == pytest.approx(50 * (0.8 + 9 / 50) + 5 * 10)
    assert seconds_left(folder, values, 100, 5) == pytest.approx(50 * (0.8 + 9 / 50) + 1 * 10)
    assert seconds_left(folder, Values(), 100, 1) is None
    assert seconds_left(RunFolder(tmp_path / "none"), values, 100, 1) is None


def test_the_sentence_that_matters_is_of_the_newest_start(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.logs.mkdir()
    old = "2026-01-01 10:00:00 E the disk is full\n2026-01-01 10:00:01 W slow\n"
    folder.log_file(0).write_text(old + "2026-01-01 11:00:00 I step 5\n  File x.py\n")
    folder.log_file(1).write_text("2026-01-01 11:00:01 C lost rank 0\n")
    warning = last_warning(folder.log_file(0))
    assert warning
    assert warning.text == "slow"
    assert fault_of(folder, warning.at + 60) == "lost rank 0"
    assert fault_of(folder, warning.at + 3600 * 24) == ""

    (jobs := folder.slurm / "8").mkdir(parents=True)
    (folder.slurm / "7").mkdir()
    fault = "crate-dist fault: rank 1 on node n1: OSError: it broke\n"
    (jobs / "8_0_log.out").write_text(f"crate-dist start 0.1: on n[0-1]\n{fault}crate-dist start 0.2: on n[0-1]\n")
    (jobs / "8_1_log.out").write_text(f"crate-dist start 0.2: rank 1 on node n1\n{fault}")
    assert fault_of(folder, 0) == "rank 1 on node n1: OSError: it broke"
    with (jobs / "8_0_log.out").open("a") as log:
        log.write("crate-dist: GIVEN UP: three starts in a row\n")
    assert fault_of(folder, 0) == "GIVEN UP: three starts in a row"
