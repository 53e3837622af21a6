"""The ledger adds up over restarts, crashes, and clocks that are set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crate_dist.run.ledger import Ledger, LedgerTotals


def replay(*events: dict[str, object]) -> LedgerTotals:
    totals = LedgerTotals()
    for event in events:
        totals.add(event)
    return totals


def start(time: float, step: int = 0) -> dict[str, object]:
    return {"event": "start", "time": time, "up_s": 0.0, "step": step}


def steps(time: float, up_s: float, after: int, step: int, busy_s: float, wait_s: float = 0.0) -> dict[str, object]:
    line = {"event": "steps", "time": time, "up_s": up_s, "after": after, "step": step}
    return {**line, "busy_s": busy_s, "wait_s": wait_s}


def test_goodput_is_the_share_of_the_time_that_went_into_steps() -> None:
    totals = replay(
        start(1000),
        steps(1010, 10, 0, 5, busy_s=8, wait_s=2),
        {"event": "whitebox", "time": 1011, "up_s": 11, "step": 5, "seconds": 0.5},
        {"event": "evaluation", "time": 1015, "up_s": 15, "step": 5, "seconds": 4.0},
        {"event": "save", "time": 1020, "up_s": 20, "step": 5, "stall_s": 0.5, "total_s": 3.0},
    )
    assert totals.wall_s == 20
    assert (totals.productive_s, totals.data_wait_s, totals.evaluation_s, totals.save_stall_s) == (6, 2, 4, 0.5)
    assert totals.goodput == pytest.approx(0.3)
    assert totals.scalars()["goodput/whitebox_fraction"] == pytest.approx(0.5 / 20)
    assert totals.lost() == pytest.approx(
        {
            "starting, and what else there was": 0.35,
            "evaluation": 0.2,
            "waiting for data": 0.1,
            "white-box measures": 0.025,
            "standing still for saves": 0.025,
            "steps made twice": 0,
        }
    )
    assert totals.goodput + sum(totals.lost().values()) == pytest.approx(1)
    assert totals.restarts == 0


def test_steps_that_a_restart_makes_again_are_counted_once() -> None:
    totals = replay(
        start(1000),
        steps(1010, 10, 0, 10, busy_s=10),
        steps(1020, 20, 10, 20, busy_s=10),
        start(1050, step=15),
        steps(1060, 10, 15, 20, busy_s=5),
    )
    assert totals.restarts == 1
    assert totals.steps_redone == 5
    assert totals.redone_s == pytest.approx(5)
    assert totals.productive_s == pytest.approx(20)
    assert totals.wall_s == 30


def test_a_weekend_in_the_queue_is_told_apart_from_the_time_that_the_run_was_up() -> None:
    start_up = {"event": "start", "time": 201_010.0, "up_s": 10.0, "step": 10}  # 10 s of imports and loading
    totals = replay(start(1000), steps(1010, 10, 0, 10, busy_s=8), start_up, steps(201_020, 20, 10, 20, busy_s=8))
    assert totals.wall_s == 30
    assert totals.away_s == totals.scalars()["goodput/away_s"] == 199_990
    assert totals.goodput == pytest.approx(16 / 30)


def test_a_run_that_is_killed_twice_between_two_saves_loses_each_time_what_it_did() -> None:
    totals = replay(
        start(0 + 1),
        steps(11, 10, 0, 10, busy_s=10),
        start(11, step=0),
        steps(21, 10, 0, 10, busy_s=10),
        start(21, step=0),
        steps(41, 20, 0, 20, busy_s=20),
    )
    assert totals.restarts == 2
    assert totals.steps_redone == 20
    assert totals.productive_s == pytest.approx(20)
    assert totals.goodput == pytest.approx(0.5)


def test_a_clock_that_is_set_changes_nothing_within_a_start() -> None:
    for jump in (-86400.0, 86400.0):
        totals = replay(start(1000), steps(1010 + jump, 10, 0, 5, busy_s=8), steps(1020 + jump, 20, 5, 10, busy_s=8))
        assert totals.wall_s == 20
        assert totals.goodput == pytest.approx(0.8)


def test_a_clock_that_was_ahead_before_a_restart_makes_no_time_negative() -> None:
    totals = replay(start(90_000), steps(90_010, 10, 0, 5, busy_s=8), start(1000, 5), steps(1010, 10, 5, 10, busy_s=8))
    assert totals.wall_s == 20
    assert 0 <= totals.goodput <= 1


def test_a_ledger_with_nothing_in_it_has_no_goodput(tmp_path: Path) -> None:
    assert Ledger(tmp_path / "ledger.jsonl").totals.scalars()["goodput/fraction"] == 0


def test_lines_that_are_none_of_its_own_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text('null\n7\n["steps"]\n{}\n{"event": "start", "step": 0}\n')
    assert Ledger(tmp_path / "ledger.jsonl").totals.productive_s == 0


def test_it_goes_on_behind_a_line_that_a_crash_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.note("start", step=0)
    ledger.note("steps", after=0, step=4, busy_s=4.0, wait_s=1.0)
    with path.open("a") as file:
        file.write('{"event": "steps", "time": 12')
    again = Ledger(path)
    assert again.totals.productive_s == pytest.approx(3)
    again.note("start", step=2)
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["start", "steps", "start"]
    assert Ledger(path).totals.restarts == 1
    assert Ledger(path).totals.steps_redone == 2


def test_a_full_disk_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with monkeypatch.context() as full:
        full.setattr("crate_dist.files.os.write", _no_space)
        ledger.note("start", step=0)
        ledger.note("steps", after=0, step=1, busy_s=1.0, wait_s=0.0)
    assert caplog.text.count("No space left on device") == 1
    ledger.note("end")
    events = [json.loads(line)["event"] for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert events == ["start", "steps", "end"]


def _no_space(*_: object) -> int:
    raise OSError(28, "No space left on device")
