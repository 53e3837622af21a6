"""Traces of steps: those that were asked for and are taken, and a run that goes on whatever becomes of them."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest
import torch

from crate_dist.config import RecipeError, load_recipe
from crate_dist.run.folder import RunFolder
from crate_dist.run.lock import ALONE
from crate_dist.training.profiler import StepTrace
from crate_dist.world import World


class Unwatched:
    """A Watchdog that looks at nothing."""

    def beat(self, where: str) -> None: ...


def traced(run: Path, recipe: Path, window: list[int], first: int, last: int) -> dict[str, list[str]]:
    """Takes these steps; the names of the traces, and of the steps in each."""
    loaded = load_recipe(recipe, log__profile_steps=window)
    world, folder = World(0, 1, 0, 1, "127.0.0.1", 0, "test"), RunFolder(run)
    folder.make()
    one = StepTrace(folder, loaded, world, torch.device("cpu"), first - 1, Unwatched(), ALONE)  # type: ignore[arg-type]
    for step in range(first, last + 1):
        with one.step(step):
            torch.ones(2).add(step)
    one.end()
    found = {}
    for path in sorted(folder.profile.glob("*")):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        assert any(event["name"] == "aten::add" for event in events)
        marks = {event["name"] for event in events if event.get("cat") == "user_annotation"}
        found[path.name.split(".")[1]] = sorted(mark.removeprefix("ProfilerStep#") for mark in marks)
    return found


@pytest.mark.parametrize(
    ("window", "taken", "expected"),
    [
        ([3, 4], (1, 6), {"steps-3-4": ["3", "4"]}),
        ([1, 2], (1, 4), {"steps-1-2": ["1", "2"]}),
        ([3, 5], (4, 6), {"steps-4-5": ["4", "5"]}),  # resumed in the middle
        ([3, 9], (1, 4), {"steps-3-4": ["3", "4"]}),  # told to stop there
        ([3, 9], (1, 2), {}),  # one step too early
        ([3, 4], (5, 6), {}),
        ([3, 4], (7, 6), {}),
    ],
)
def test_of_the_steps_that_are_asked_for_those_are_traced_that_are_taken(
    tmp_path: Path, small_recipe: Path, window: list[int], taken: tuple[int, int], expected: dict[str, list[str]]
) -> None:
    assert traced(tmp_path / "run", small_recipe, window, *taken) == expected


def test_a_trace_that_cannot_be_written_ends_no_run(
    tmp_path: Path, small_recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert traced(tmp_path / "run", small_recipe, [1, 1], 1, 2) == {}
    assert "the trace of steps 1-1 could not be written" in caplog.text


@pytest.mark.parametrize("window", [[5, 4], [1, 101], [0, 2]])
def test_a_window_that_is_none_is_refused_with_one_that_would_do(small_recipe: Path, window: list[int]) -> None:
    with pytest.raises(RecipeError, match=r"log\.profile_steps") as refused:
        load_recipe(small_recipe, log__profile_steps=window)
    if window[0]:
        assert "as in [100, 105]" in str(refused.value)
