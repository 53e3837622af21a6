"""A conversion by many nodes, submitted by launch/prep.py."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.cluster.runs import Arguments
from tests.cluster.testbed import Cluster, wait_until
from tests.data_prep import convert, fingerprint, picture, shards_only, write_tree
from tests.ranks import REPOSITORY

pytestmark = pytest.mark.slurm

OPTIONS = ("--shard-samples", "3", "--quality", "90")


def test_an_array_of_parts_of_which_one_is_requeued_writes_what_one_machine_writes(
    cluster: Cluster, tmp_path: Path
) -> None:
    large = picture(1, (1600, 1200))  # so that a part lasts for some seconds
    source = write_tree(tmp_path / "images", {f"c{number % 4}/{number}.jpg": large for number in range(180)})
    program: Arguments = [sys.executable, REPOSITORY / "launch" / "prep.py", "--out", tmp_path / "many"]
    given: Arguments = ["--converter", "image_folder", "--source", source, "--parts", "3", *OPTIONS]
    said = cluster.run([*program, *given, "--cpus-per-task", "1", "--time", "10"], cwd=tmp_path).stdout
    job = re.search(r"^job +(\d+), 3 parts$", said, re.MULTILINE)
    assert job, said
    split = tmp_path / "many" / "train"
    wait_until(lambda: (split / "shards-002-of-003.jsonl").exists(), "first shard of the second part")
    second = f"{job[1]}_1"
    cluster.run(["scancel", "--signal=USR2", second])  # as SLURM does before the time limit
    wait_until(lambda: cluster.job(second).restarts == 1, "second start of the second part")
    lines = cluster.run([*program, "--status"], check=False).stdout.splitlines()
    assert re.match(r"part 1/3: \d+ of 20 shards, (finished|job \d+ on n\d)$", lines[0]), lines
    assert re.match(r"part 2/3: ([1-9]|1\d) of 20 shards, (stopped, was )?job \d+ on n\d$", lines[1]), lines
    assert lines[3] == "the index: when all parts are finished"

    for task, restarts in ((0, 0), (1, 1), (2, 0)):
        cluster.wait_for(f"{job[1]}_{task}", "COMPLETED", restarts=restarts, timeout_s=240)
    assert "is whole: train" in cluster.run([*program, "--status"]).stdout
    convert("image_folder.py", source, tmp_path / "one", *OPTIONS, "--workers", 2)
    assert shards_only(fingerprint(tmp_path / "many")) == shards_only(fingerprint(tmp_path / "one"))
    log = next((tmp_path / "many/.slurm").glob(f"{second}/*_0_log.out")).read_text()
    assert re.search(r"part 2/3 is finished, 20 shards, \d+ of them from before", log), log
