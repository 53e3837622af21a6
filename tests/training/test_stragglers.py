"""A rank that holds the others up is named with its node and the reason; even ranks never are, on a busy machine."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crate_dist.run.folder import RunFolder
from crate_dist.training.stragglers import Stragglers
from tests.conftest import SMALL_RECIPE
from tests.ranks import REPOSITORY, free_port, rank_environment

STEPS_EACH = 80
"""That a rank is slow in, of which the first ten are not judged, and 50 make it sure."""
DELAY_S = 0.15
"""Of each of them: much more than ranks on a busy machine differ by."""
SLOW = f"""
import os, sys, time
from crate_dist import train
from crate_dist.data.loader import TrainLoader
from crate_dist.training.engine import Engine

def slowed(owner, name, first):
    function, calls = getattr(owner, name), [0]
    def slow(*given, **named):
        calls[0] += 1
        time.sleep({DELAY_S} * (first < calls[0] <= first + {STEPS_EACH}))
        return function(*given, **named)
    setattr(owner, name, slow)

if os.environ["RANK"] == "1":
    slowed(Engine, "criterion", 0)
if os.environ["RANK"] == "2":
    slowed(TrainLoader, "__next__", {STEPS_EACH})
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.spawn
def test_slow_ranks_are_named_with_their_node_and_why(tmp_path: Path, cast_shards: Path) -> None:
    recipe, run_dir, port, ranks = tmp_path / "small.toml", tmp_path / "run", free_port(), 3
    recipe.write_text(SMALL_RECIPE)
    settings = ["log.every_steps=10", "log.whitebox_every_steps=0", "checkpoint.every_steps=1000", "train.epochs=20"]
    settings += ["data.val_split=", "train.micro_batch=8", f"train.max_steps={2 * STEPS_EACH}"]
    arguments = ["--config", recipe, "--data", cast_shards, "--run-dir", run_dir]
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                SLOW,
                *map(str, arguments),
                *(word for text in settings for word in ("--set", text)),
            ],
            cwd=REPOSITORY,
            env={**os.environ, **rank_environment(rank, ranks, port), "SLURMD_NODENAME": f"n{rank}"},
            stderr=subprocess.DEVNULL,
        )
        for rank in range(ranks)
    ]
    assert [process.wait(timeout=240) for process in processes] == [0] * ranks
    folder = RunFolder(run_dir)
    lines = [line for line in folder.log_file(0).read_text().splitlines() if "slower than the median" in line]
    said = [line for line in lines if " W rank " in line]
    assert len(said) == 2
    report = [line for line in lines if line.startswith("  warning ")]  # repeats the newest at the end of the run
    assert [line.endswith(said[1].partition(" W ")[2]) for line in report] == [True]
    for rank, why, line in ((1, "computes", said[0]), (2, "waits for data", said[1])):
        assert f" W rank {rank} on node n{rank} is " in line
        assert f" % slower than the median for the last 5 reports ({why}); it costs all ranks about " in line
    curves = EventAccumulator(str(folder.tensorboard)).Reload()
    assert [event.value for event in curves.Scalars("3 speed/slowest_rank")] == [1] * 7 + [2] * 8
    assert all(event.value > 0.2 for event in curves.Scalars("3 speed/slowest_rank_lag"))
    texts = [event.tensor_proto.string_val[0].decode() for event in curves.Tensors("stragglers/text_summary")]
    assert all(line.endswith(text) for line, text in zip(said, texts, strict=True))


def judged(own_s: list[list[float]], step_s: float = 1.0, nodes: str = "aabb") -> list[str]:
    """What is said of ranks that were by themselves for so long, report by report of ten steps."""
    stragglers = Stragglers(nodes)
    lags = [stragglers.note(10, own, [0.0] * len(nodes), 10 * step_s) for own in [own_s[0], *own_s]]
    return [lag.text for lag in lags if lag and lag.text]


def test_ranks_that_are_slow_in_turn_or_by_a_little_are_none() -> None:
    rng = random.Random(1)
    noise = [[4 * rng.uniform(1, 1.25) for _ in range(4)] for _ in range(1000)]
    assert judged(noise) == []
    hiccups = [[4.0 + 6.0 * (report % 4 == rank) for rank in range(4)] for report in range(1000)]
    assert judged(hiccups) == []
    assert judged([[4.3, 4, 4, 4]] * 1000) == []


def test_a_whole_node_is_said_in_one_line_and_again_only_much_later() -> None:
    assert judged([[4, 4, 7, 6.9]] * 60) == [
        "rank 2 on node b is 75 % slower than the median for the last 5 reports (computes); it costs all ranks about "
        "43 % of their time; slow as well: 1 of node b",
        "rank 2 on node b is 75 % slower than the median for the last 50 reports (computes); it costs all ranks about "
        "43 % of their time; slow as well: 1 of node b",
    ]


def test_reports_of_few_steps_are_judged_together() -> None:
    stragglers = Stragglers("ab")
    assert [stragglers.note(1, [1, 2], [0, 0], 3) is None for _ in range(29)].count(False) == 1


def test_what_costs_little_of_a_step_is_not_said() -> None:
    assert judged([[0.1, 0.1, 0.1, 0.2]] * 10) == []
