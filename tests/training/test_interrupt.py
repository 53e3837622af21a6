"""A signal to any rank stops all of them at one step, with that step saved."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from crate_dist.run.exit_status import STOPPED
from tests.chaos.faults import Fault
from tests.chaos.ranks import Ranks, wait_until
from tests.chaos.trial import Trial

pytestmark = pytest.mark.spawn

BEFORE_THE_TRAINING = ("joining the other ranks", "making the run folder")


def tell(ranks: Ranks, rank: int, signum: int) -> None:
    """Sends a signal to one rank's process alone."""
    pid = ranks.processes[rank].pid
    assert pid is not None
    os.kill(pid, signum)


def stands_still(ranks: Ranks, rank: int) -> bool:
    """Whether a rank's process was stopped by a signal."""
    stat = Path(f"/proc/{ranks.processes[rank].pid}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] == "T"


def interrupted(trial: Trial, signum: int, ranks_told: list[int], workers_too: bool = False) -> int:
    """A run that gets a signal after its 12th step; the step at which it stopped."""
    with trial.start() as ranks:
        wait_until(lambda: "step 12/25" in ranks.output(0), "step 12")
        for rank in ranks_told:
            if workers_too:
                os.killpg(ranks.processes[rank].pid or 0, signum)
            else:
                tell(ranks, rank, signum)
        assert ranks.wait() == [STOPPED, STOPPED], ranks.output(0)
        said = ranks.output(0)
    step = max(step for step, _ in trial.samples()) + 1
    assert f"stopped at step {step} of 25" in said
    assert (trial.run.checkpoints / f"step-{step:08d}").is_dir()
    return step


@pytest.mark.parametrize(("signum", "rank"), [(signal.SIGTERM, 1), (signal.SIGUSR2, 0), (signal.SIGINT, 0)])
def test_told_to_one_rank_all_stop_at_the_same_step_and_lose_none(trial: Trial, signum: int, rank: int) -> None:
    step = interrupted(trial, signum, [rank])
    assert {made for made, _ in trial.samples()} == set(range(step))
    assert len(trial.samples()) == 2 * step
    trial.finish()
    assert trial.restarts() == [0, step]
    assert "0 steps made twice" in (trial.folder / "notes" / "output-0").read_text().rpartition("goodput")[2]
    trial.check_curves()
    trial.check_samples()
    trial.check_weights()


def test_loader_workers_that_get_the_signal_too_go_on_until_their_rank_ends_them(trial: Trial) -> None:
    step = interrupted(trial, signal.SIGTERM, [0, 1], workers_too=True)
    assert step < 25
    assert "DataLoader worker" not in (trial.folder / "notes" / "output-0").read_text()


@pytest.mark.parametrize("point", [*BEFORE_THE_TRAINING, "building the engine", "taking a step"])
def test_a_signal_in_the_first_initialisation_loses_nothing(trial: Trial, point: str) -> None:
    meeting = point == "joining the other ranks"  # where rank 1 may still be importing
    with trial.start(faults={rank: Fault(point) for rank in ((0, 1) if meeting else (0,))}) as ranks:
        ranks.wait_for_fault(0)
        if meeting:
            wait_until(lambda: all(stands_still(ranks, rank) for rank in (0, 1)), "both ranks")
        for rank in (0, 1):
            tell(ranks, rank, signal.SIGTERM)
            tell(ranks, rank, signal.SIGCONT)
        began = time.monotonic()
        statuses = ranks.wait()
        assert time.monotonic() - began < 60
    assert set(statuses) == {STOPPED}
    trial.finish()
    assert max(trial.restarts()) == 0
    trial.check_samples()
    trial.check_weights()


def test_a_second_ctrl_c_ends_a_rank_at_once(trial: Trial) -> None:
    with trial.start(faults={0: Fault("taking a step", 5, "slow", seconds=60.0)}) as ranks:
        ranks.wait_for_fault(0)
        for _ in range(2):  # the terminal's and torchrun's
            tell(ranks, 0, signal.SIGINT)
        time.sleep(1.5)
        assert ranks.running() == [0, 1]
        tell(ranks, 0, signal.SIGINT)
        wait_until(lambda: 0 not in ranks.running(), "end of rank 0", 5.0)
        assert ranks.processes[0].exitcode in (-signal.SIGINT, 128 + signal.SIGINT)


def test_a_second_ctrl_c_ends_a_rank_that_waits_for_another(trial: Trial) -> None:
    with trial.start(faults={1: Fault("taking a step", 5)}) as ranks:
        ranks.wait_for_fault(1)
        for _ in range(2):
            tell(ranks, 0, signal.SIGINT)
            time.sleep(2.5)
        wait_until(lambda: 0 not in ranks.running(), "end of rank 0", 5.0)
        assert ranks.processes[0].exitcode == 128 + signal.SIGINT


def test_an_evaluation_is_left_at_a_signal_and_made_by_the_next_start(trial: Trial) -> None:
    slow = Fault("evaluating", 1, "slow", times=4, seconds=2.0)  # all its batches of the first evaluation
    with trial.start(faults={1: slow}) as ranks:
        ranks.wait_for_fault(1)
        tell(ranks, 0, signal.SIGTERM)
        began = time.monotonic()
        assert ranks.wait() == [STOPPED, STOPPED], ranks.output(0)
        assert time.monotonic() - began < 7.0
    assert trial.lines("val/top1") == {}
    assert (trial.run.checkpoints / "step-00000009").is_dir()
    with trial.start(faults={1: Fault("evaluating", 2, "slow", seconds=60.0)}) as ranks:  # when it is caught up on
        ranks.wait_for_fault(1)
        for rank in (0, 1):
            tell(ranks, rank, signal.SIGTERM)
        began = time.monotonic()
        assert ranks.wait() == [STOPPED, STOPPED], ranks.output(0)
        assert time.monotonic() - began < 5.0
    assert trial.lines("val/top1") == {}
    trial.finish()
    assert trial.restarts() == [0, 9, 9]
    trial.check()


def test_a_white_box_measure_is_left_at_a_signal_and_made_by_the_next_start(trial: Trial) -> None:
    often = ("--set", "log.whitebox_every_steps=5", "--set", "log.whitebox_images=4")
    with trial.start(*often, faults={0: Fault("measuring the white box", 2, "slow", seconds=4.0)}) as ranks:
        ranks.wait_for_fault(0)
        tell(ranks, 1, signal.SIGTERM)  # which waits for rank 0
        assert ranks.wait() == [STOPPED, STOPPED], ranks.output(0)
    assert list(trial.lines("whitebox/zeros")) == [1]
    trial.finish(*often)
    assert trial.restarts() == [0, 5]
    assert list(trial.lines("whitebox/zeros")) == [1, 5, 10, 15, 20, 25]
    assert [step for step, _ in trial.curve("whitebox/zeros/layer-01")] == [1, 5, 10, 15, 20, 25]
    trial.check()


def test_the_record_says_how_often_the_run_was_started(trial: Trial) -> None:
    interrupted(trial, signal.SIGTERM, [0])
    starts = json.loads(trial.run.record_file.read_text())["starts"]
    assert [start["step"] for start in starts] == [0]
