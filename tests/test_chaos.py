"""A few of the faults of `make chaos`: each run resumes by itself and ends as if nobody had disturbed it."""

from __future__ import annotations

import pytest

from tests.chaos.trial import Trial
from tests.chaos.trials import Case, cases

pytestmark = pytest.mark.spawn


@pytest.mark.parametrize("case", [case for case in cases() if case.short], ids=lambda case: case.name)
def test_a_run_survives(case: Case, trial: Trial) -> None:
    case.disturb(trial)
    if not trial.finished:
        trial.finish()
    trial.check()
