"""A signal to any rank stops all of them at one step, with that step saved."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from crate_dist.status import STOPPED
from tests.chaos.faults import Fault
from tests.chaos.ranks import Ranks, wait_until
from tests.chaos.trial import Trial

pytestmark = pytest.mark.spawn


def tell(ranks: Ranks, rank: int, signum: int) -> None:
    """Sends a signal to one rank's process alone."""
    pid = ranks.processes[rank].pid
    assert pid is not None
    os.kill(pid, signum)


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


@pytest.mark.parametrize(("signum", "rank"), [(signal.SIGTERM, 1), (signal.SIGUSR2, 0)])
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


@pytest.mark.parametrize("point", ["joining the other ranks", "making the run folder", "building the engine"])
def test_a_signal_in_the_first_initialisation_loses_nothing(trial: Trial, point: str) -> None:
    with trial.start(faults={0: Fault(point)}) as ranks:
        pid = ranks.wait_for_fault(0)
        for rank in (0, 1):
            tell(ranks, rank, signal.SIGTERM)
        os.kill(pid, signal.SIGCONT)
        began = time.monotonic()
        statuses = ranks.wait()
        assert time.monotonic() - began < 60
    assert set(statuses) <= {STOPPED, -signal.SIGTERM}
    trial.finish()
    assert max(trial.restarts()) <= 2  # it is agreed on beside the steps
    trial.check_samples()
    trial.check_weights()


def test_the_record_says_how_often_the_run_was_started(trial: Trial) -> None:
    interrupted(trial, signal.SIGTERM, [0])
    starts = json.loads(trial.run.record_file.read_text())["starts"]
    assert [start["step"] for start in starts] == [0]
