"""One run, disturbed and started again with the same command, held against the same run undisturbed."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crate_dist.checkpoint.loading import list_checkpoints
from crate_dist.run.dashboard import tags_of
from crate_dist.run.folder import RunFolder
from tests.chaos.faults import Fault
from tests.chaos.ranks import Ranks
from tests.ranks import lock_is_free

GRACE_S = 5.0
"""Seconds that a launcher gives the ranks that are left when one has died, before it kills them."""
STEPS, SAMPLES, EPOCHS = 25, 200, 3
"""Of the recipe and the shards in tests/conftest.py."""
VOLATILE = ("time", "speed/", "memory/", "run/left_h")
"""How the names begin of what depends on the machine's mood."""


@dataclass
class Trial:
    """A folder with one run in it, the command that it is started with, and what is to come of it.

    reference: the run that nobody disturbed; None for that run itself
    said: what happened, for the table
    lost_a_save: one failed, by design, so that others are the newest than in the reference
    unreadable: names of checkpoints that were damaged in such a way that the program must leave them alone
    finished: the command was started without a fault, and ended well
    """

    folder: Path
    arguments: Sequence[object]
    reference: Trial | None = None
    said: list[str] = field(default_factory=list)
    lost_a_save: bool = False
    unreadable: list[str] = field(default_factory=list)
    finished: bool = False

    @property
    def run(self) -> RunFolder:
        """The run folder."""
        return RunFolder(self.folder / "run")

    def start(self, *more: object, faults: Mapping[int, Fault] | None = None, port: int | None = None) -> Ranks:
        """Starts the command, with faults by rank, and with settings that do not change the result."""
        arguments = [*self.arguments, "--run-dir", self.run.path, *more]
        return Ranks(arguments, self.folder / "notes", faults=faults, port=port)

    def kill_one(self, rank: int, fault: Fault) -> None:
        """kill -9 of the one process that stands still at its fault. The others end by themselves, or are ended."""
        with self.start(faults={rank: fault}) as ranks:
            os.kill(ranks.wait_for_fault(rank), signal.SIGKILL)
            self.leave(ranks)

    def kill_all(self, rank: int, fault: Fault) -> None:
        """kill -9 of every rank when this one stands still at its fault."""
        with self.start(faults={rank: fault}) as ranks:
            ranks.wait_for_fault(rank)

    def kill_after(self, seconds: float, victim: int | None) -> None:
        """kill -9 of a rank, or of all of them, at a moment after the start."""
        with self.start() as ranks:
            began = time.monotonic()
            while time.monotonic() - began < seconds and ranks.running():
                time.sleep(0.005)
            if victim is not None:
                ranks.kill(victim)
                self.leave(ranks)

    def leave(self, ranks: Ranks) -> None:
        """Ends the other ranks as a launcher does when one has died."""
        began = time.monotonic()
        while ranks.running() and time.monotonic() - began < GRACE_S:
            time.sleep(0.02)
        left = ranks.running()
        self.said.append(
            f"ranks {left} were ended by the launcher"
            if left
            else f"the others ended by themselves in {time.monotonic() - began:.1f} s"
        )

    def finish(self, *more: object) -> str:
        """The same command without a fault: it must end well, by itself. Gives what rank 0 said in it."""
        with self.start(*more) as ranks:
            before = len(ranks.output(0))
            statuses = ranks.wait()
            said = ranks.output(0)[before:]
            self.finished = statuses == [0, 0]
            assert self.finished, f"exit status {statuses}\n{said}\n{ranks.output(1)}"
        return said

    def restarts(self) -> list[int]:
        """The steps from which the run was started."""
        return [start["step"] for start in json.loads(self.run.record_file.read_text())["starts"]]

    def check(self) -> None:
        """The run ended as the undisturbed one did, and nothing of the disturbance is left. Raises AssertionError."""
        self.check_curves()
        self.check_samples()
        self.check_checkpoints()
        assert lock_is_free(self.run), "the lock was left"
        self.check_weights()

    def check_weights(self) -> None:
        """The exported ones, bit for bit."""
        if self.reference:
            for which in ("last", "best"):
                _assert_same_weights(self.run.model(which), self.reference.run.model(which))

    def check_curves(self) -> None:
        """Every step once, in metrics.jsonl and in TensorBoard's files, with the undisturbed run's values."""
        steps = self.lines("train/loss")
        assert list(steps) == list(range(1, STEPS + 1)), f"metrics.jsonl has the steps {list(steps)}"
        evaluated = self.lines("val/top1")
        loss, top1 = self.curve("train/loss"), self.curve("val/top1")
        assert [step for step, _ in loss] == list(steps), f"TensorBoard has the steps {loss}"
        assert [step for step, _ in top1] == list(evaluated), f"TensorBoard has the evaluations {top1}"
        if self.reference:
            assert steps == self.reference.lines("train/loss")
            assert evaluated == self.reference.lines("val/top1")
            assert loss == self.reference.curve("train/loss")
            assert top1 == self.reference.curve("val/top1")

    def check_samples(self) -> None:
        """Each sample was once in every epoch of the steps that count, however often a step was made.

        An epoch has its own crop of it, so that all pictures differ.
        """
        made = self.samples()
        assert sorted(made) == [(step, rank) for step in range(STEPS) for rank in range(2)]
        pictures = [picture for samples in made.values() for picture in samples]
        assert len(pictures) == len(set(pictures)) == SAMPLES * EPOCHS
        if self.reference:
            assert made == self.reference.samples()

    def check_checkpoints(self) -> None:
        """The newest and the best, all of them whole, and nothing else but what the program could not open."""
        there = {path.name for path in self.run.checkpoints.iterdir()}
        saved = list_checkpoints(self.run.checkpoints)
        assert there == {checkpoint.path.name for checkpoint in saved} | set(self.unreadable), (
            f"in checkpoints/: {there}"
        )
        assert [checkpoint.damaged() for checkpoint in saved] == [None] * len(saved)
        if self.reference and not self.lost_a_save:
            steps = [checkpoint.step for checkpoint in list_checkpoints(self.reference.run.checkpoints)]
            assert [checkpoint.step for checkpoint in saved] == steps

    def lines(self, key: str) -> dict[int, dict[str, float]]:
        """The lines of metrics.jsonl that have a key, by step, without what depends on the machine's mood."""
        found: dict[int, dict[str, float]] = {}
        for text in self.run.metrics.read_text().splitlines():
            line = json.loads(text)
            if key in line:
                assert line["step"] not in found, f"metrics.jsonl has step {line['step']} twice"
                found[line["step"]] = {name: value for name, value in line.items() if not name.startswith(VOLATILE)}
        return found

    def curve(self, tag: str) -> list[tuple[int, float]]:
        """As TensorBoard shows it."""
        logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of what is to be seen here: restarts
        events = EventAccumulator(str(self.run.tensorboard), size_guidance={"scalars": 0})
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars(tags_of(self.run)(tag))]

    def samples(self) -> dict[tuple[int, int], list[str]]:
        """Reads each rank's samples of each step (counted from 0). A step that was made twice had the same samples."""
        made: dict[tuple[int, int], list[str]] = {}
        for rank in range(2):
            for text in (self.folder / "notes" / f"samples-{rank}").read_text().splitlines():
                step, used = json.loads(text)
                assert made.setdefault((step, rank), used) == used, f"step {step} of rank {rank} had other samples"
        return made


def _assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = (torch.load(path, weights_only=True) for path in (a, b))
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for name, weight in ours["state_dict"].items():
        assert torch.equal(weight, theirs["state_dict"][name]), f"{a}: {name} differs"
    assert _plain(ours["meta"]) == _plain(theirs["meta"])


def _plain(meta: Any) -> str:
    return json.dumps(meta, sort_keys=True)


def clear(trial: Trial) -> None:
    """Removes what a trial that went well has left."""
    shutil.rmtree(trial.folder, ignore_errors=True)
