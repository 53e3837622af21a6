"""What a person sees who opens TensorBoard at the address that is printed."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest

from crate_dist.run.dashboard import tag
from crate_dist.run.folder import RunFolder
from crate_dist.training.tensorboard import Curves
from tests.browser import CHROMIUM, overview, page, tensorboard

NAMES = ("train/loss", "val/top1", "train/grad_norm", "speed/images_per_s", "speed/x", "whitebox/zeros/layer-01")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to look with")
def test_the_overview_is_what_is_seen_first_and_runs_of_a_sweep_compare(tmp_path: Path) -> None:
    for lr in (0.001, 0.002):
        run = tmp_path / f"lr={lr}"
        run.mkdir()
        curves = Curves(run, None, tag=tag)
        curves.settings(run.name, {"a.same": 5, "optim.lr": lr, "optim.betas": [0.9, 0.99]})
        for step in range(1, 4):
            curves.scalars(dict.fromkeys(NAMES, 1000 * lr + step), step)
        curves.close()
    with tensorboard(tmp_path) as url:
        seen = page(overview(url, RunFolder(run)))
        as_json = {"Content-Type": "application/json"}
        ask = urllib.request.Request(f"{url}data/plugin/hparams/experiment", b"{}", as_json)
        compared = json.loads(urllib.request.urlopen(ask).read())
    assert "Run lr=0.001 lr=0.002 All" in seen, "runs are called by their folders"
    words = ("Pinned 3 cards", "Loss, train", "1 overview 3 cards", "2 training", "3 speed", "9 layer by layer")
    places = [seen.index(word) for word in words]
    assert places == sorted(places)
    assert [setting["name"] for setting in compared["hparamInfos"]] == ["optim.lr", "a.same", "optim.betas"]
    first = [metric["name"]["tag"] for metric in compared["metricInfos"]][:2]
    assert first == ["1 overview/Loss, train", "1 overview/Top-1, val"]
