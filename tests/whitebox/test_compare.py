"""Several runs are drawn in one figure, from what they have measured themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crate_dist.figures.__main__ import main

Lines = list[dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path) -> Callable[[str, Lines], str]:
    """Makes a run folder that has measured what `lines` say."""

    def make(name: str, lines: Lines) -> str:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "recipe.toml").touch()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(folder)

    return make


def measured(steps: int, loss: float) -> Lines:
    """Ten steps an epoch; measured at the beginning and at the end."""
    lines: Lines = [{"step": n, "train/epoch": n / 10, "train/loss": loss / n} for n in range(1, steps + 1)]
    lines += [{"step": n, "val/top1": 50 + n} for n in range(10, steps + 1, 10)]
    for step, zeros in ((1, [0.4, 0.5]), (steps, [0.6, 0.75])):
        lines.append({"step": step, "whitebox/zeros": zeros, "whitebox/coding_rate": [100.0 * step, 80.0]})
    return lines


def test_runs_are_compared_over_their_epochs_and_layers(
    run: Callable[[str, Lines], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = [{"step": 4, "train/epoch": 0.5, "train/loss": 1.5}]
    runs = [run("a/base", measured(30, 3)), run("b/base", measured(2000, 5)), run("bare", bare)]
    assert main(["compare", *runs, "--out", str(tmp_path / "out"), "--format", "png", "svg"]) == 0
    with np.load(tmp_path / "out" / "compare.npz") as numbers:
        loss = numbers["a/base/loss"]
        assert np.allclose(loss[0], np.arange(1, 31) / 10)
        assert np.allclose(loss[1] * np.arange(1, 31), 3)
        assert np.allclose(numbers["a/base/top-1"], [[1, 2, 3], [60, 70, 80]])
        assert np.allclose(numbers["a/base/non-zeros"], [[1, 2], [40, 25]])
        assert np.allclose(numbers["b/base/coding rate"], [[1, 2], [200_000, 80]])
        long = numbers["b/base/loss"]
        assert long.shape == (2, 200)  # means of ten reports each
        assert long[1, 0] == pytest.approx(np.mean(5 / np.arange(1, 11)))
    said = capsys.readouterr().out
    assert "3 runs; not measured: " in said
    assert "bare (" in said
    svg = (tmp_path / "out" / "compare.svg").read_text()
    for text in ("a/base", "b/base", "training loss", "validation top-1", "coding rate", "non-zeros of the sparse"):
        assert f"<!-- {text}" in svg
    with Image.open(tmp_path / "out" / "compare.png") as image:
        assert image.width == 1890


def test_what_cannot_be_compared_is_named(
    run: Callable[[str, Lines], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = run("good", measured(10, 3))
    cases = {
        (good, str(tmp_path)): "is no run: there is no recipe.toml in it; the runs in it are good, new, odd: give them",
        (run("new", []),): "new has measured nothing yet; it reports every log.every_steps steps",
        (run("odd", [{"step": 1, "train/loss": "x", "train/epoch": [2]}]),): "metrics.jsonl is damaged: ",
        (good, good): "the same run is given twice",
        (good, "--names", "one", "two"): "--names: 2 different names for 1 runs; give one for each",
    }
    for arguments, expected in cases.items():
        assert main(["compare", *arguments, "--out", str(tmp_path / "out")]) == 1
        assert expected in capsys.readouterr().err
