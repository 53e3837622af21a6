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
    """Told to stop while its mirror answers nothing, it ends all the same, within the notice that it has."""
    served = tmp_path / "served"
    served.mkdir()
    with serving(served) as server:
        mirror = ("--set", f"checkpoint.mirror={server.url}", "--set", "safety.lease_s=1")
        with trial.start(*mirror, "--set", "cluster.signal_delay_s=4") as ranks:
            wait_until(lambda: bool(mirrored_steps(served)), "a copy in the mirror")
            server.put_faults["*"] = ["hang", "forever"]
            wait_until(lambda: "step 12/25" in ranks.output(0), "step 12")
            for rank in ranks.processes:
                os.kill(rank.pid or 0, signal.SIGUSR2)
            assert ranks.wait() == [STOPPED, STOPPED], ranks.output(0)
            said = ranks.output(0)
        newest = mirrored_steps(served)[-1]
        assert f"IS NOT IN THE MIRROR {server.url}/run, which has step {newest}; the next start copies it" in said
        server.put_faults.clear()
        server.released.set()
        shutil.rmtree(trial.run.path)

        said = trial.finish(*mirror)
        assert f"RESTORED step {newest} of this run from {server.url}/run" in said
        assert f"step 25 is in the mirror {server.url}/run" in said
        assert trial.restarts() == [0, newest]
        trial.check()
        record = json.loads((served / "run" / "mirror.json").read_text())
        assert record["checkpoints"][-1]["files"].keys() >= {"metrics.jsonl", "model-last.pt", "model-best.pt"}
        assert record["writer"]["ended"]
