"""Where the curves of a run lie, and what they are called: those of an older run stay as they began."""

from __future__ import annotations

from pathlib import Path

import pytest

from crate_dist.checkpoint.mirror.copying import run_files
from crate_dist.checkpoint.mirror.record import Copied, Mirrored
from crate_dist.run.dashboard import address, how_to_watch, tag, tags_of
from crate_dist.run.folder import EVENTS, RunFolder


def test_an_older_run_goes_on_where_its_curves_lie_and_under_their_names(tmp_path: Path) -> None:
    older, new = RunFolder(tmp_path / "older"), RunFolder(tmp_path / "new")
    for folder in (older, new):
        folder.path.mkdir()
    (older.path / "tensorboard").mkdir()
    assert older.tensorboard == older.path / "tensorboard"
    assert new.tensorboard == new.path
    assert tags_of(older)("train/loss") == "train/loss"
    assert tags_of(new)("train/loss") == "1 overview/Loss, train"
    assert "%22train%2Floss%22" in address(older)
    assert how_to_watch(new)[0] == f"tensorboard --logdir {tmp_path}"


@pytest.mark.parametrize("where", ["", "tensorboard"])
def test_the_curves_go_along_into_a_mirror_wherever_they_lie(tmp_path: Path, where: str) -> None:
    (tmp_path / where).mkdir(exist_ok=True)
    file = tmp_path / where / f"{EVENTS}0000000001.node.7"
    file.touch()
    (place,) = run_files(RunFolder(tmp_path))
    assert tmp_path / place == file
    there = Copied("step-00000005.12ab/manifest.json", 0, "0" * 64)
    Mirrored("step-00000005", 5, -1, {"checkpoints/step-00000005/manifest.json": there, place: there})


def test_groups_stand_in_the_order_in_which_they_are_read() -> None:
    names = "train/loss train/grad_norm images_per_s/rank-00001 memory/peak goodput/fraction whitebox/profile"
    tags = [tag(name) for name in f"{names} checkpoint/stall_s data/bad_samples whitebox/zeros/layer-01".split()]
    assert tags == sorted(tags)
    assert len({shown.partition("/")[0] for shown in tags}) == len(tags)
    assert tag("something/else") == "something/else"
