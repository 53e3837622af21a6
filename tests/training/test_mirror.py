"""A run whose folder was lost goes on from its mirror as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from crate_dist.run.exit_status import STOPPED
from tests.chaos.ranks import wait_until
from tests.chaos.trial import Trial
from tests.servers import serving

pytestmark = pytest.mark.spawn


def mirrored_steps(served: Path) -> list[int]:
    record = served / "run" / "mirror.json"
    return [saved["step"] for saved in json.loads(record.read_text())["checkpoints"]] if record.is_file() else []


def test_a_run_whose_folder_was_lost_ends_bit_for_bit_the_same_and_is_one_curve(trial: Trial, tmp_path: Path) -> None:
    served = tmp_path / "served"
    served.mkdir()
    with serving(served) as server:
        mirror = ("--set", f"checkpoint.mirror={server.url}")
        with trial.start(*mirror) as ranks:
            wait_until(lambda: "step 12/25" in ranks.output(0), "step 12")
            os.kill(ranks.processes[1].pid or 0, signal.SIGTERM)
            assert ranks.wait() == [STOPPED, STOPPED], ranks.output(0)
            said = ranks.output(0)
        stopped_at = mirrored_steps(served)[-1]
        assert f"step {stopped_at} is in the mirror {server.url}/run" in said
        assert stopped_at >= 12
        shutil.rmtree(trial.run.path)

        said = trial.finish(*mirror)
        assert f"RESTORED step {stopped_at} of this run from {server.url}/run" in said
        assert trial.restarts() == [0, stopped_at]
        trial.check()
        assert trial.run.checkpoints.is_dir()
        assert mirrored_steps(served)[-1] == 25
