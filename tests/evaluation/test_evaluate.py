"""Evaluation counts every sample once, at any number of ranks, and as a command on anything that holds weights."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from crate_dist.checkpoint.trained import load_trained
from crate_dist.config import ImageSection, ModelSection, load_recipe
from crate_dist.data.index import ShardIndex
from crate_dist.data.loader import Normalize, eval_loader, eval_transform
from crate_dist.data.reader import BadSample
from crate_dist.evaluate import Evaluation, evaluate, main
from crate_dist.launching.preflight import check_init_from
from crate_dist.models.build import build_model
from crate_dist.models.transformer import Transformer
from crate_dist.models.weights.names import to_reference
from crate_dist.models.weights.write import export_model, export_reference
from crate_dist.world import World
from tests.conftest import casts, write_split
from tests.ranks import REPOSITORY, free_port, rank_environment, spawn, train_to_the_end

pytestmark = pytest.mark.spawn

IMAGES = ImageSection(eval_crop=1.0)
NO_IMAGES = {3, 4, 17, 18, 19, 36}


def model() -> Transformer:
    return build_model(ModelSection(arch="crate_demo", image_size=32, patch_size=8), 4, seed=3).eval()


def evaluate_on_ranks(world: World, device: torch.device, shards: Path) -> Evaluation:
    index, net, normalize = (
        ShardIndex.load(shards / "val"),
        model(),
        Normalize(IMAGES.mean, IMAGES.std, device, torch.float32),
    )
    batches = eval_loader(index, world.rank, world.world_size, eval_transform(IMAGES, 32), batch=8, workers=0)
    return evaluate(lambda images: net(normalize(images)), batches, device)


def by_hand(shards: Path) -> tuple[float, float]:
    """Accuracy in per cent and loss of model() on the whole split in one batch."""
    index = ShardIndex.load(shards / "val")
    (batch,) = eval_loader(index, 0, 1, eval_transform(IMAGES, 32), batch=1000, workers=0)
    with torch.no_grad():
        logits = model()(Normalize(IMAGES.mean, IMAGES.std, torch.device("cpu"), torch.float32)(batch.images))
    right = (logits.argmax(dim=1) == batch.labels).float().mean()
    return 100 * float(right), float(F.cross_entropy(logits, batch.labels))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_the_result_is_that_of_all_samples_once_at_any_number_of_ranks(cast_shards: Path, world_size: int) -> None:
    top1, loss = by_hand(cast_shards)
    for result in spawn(evaluate_on_ranks, world_size, cast_shards):
        assert result.samples == 37
        assert result.top1 == pytest.approx(top1)
        assert result.top5 == 100  # of four classes
        assert result.loss == pytest.approx(loss, rel=1e-5)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with val/, 37 samples of which numbers 3, 4, 17 to 19 (where two ranks part) and 36 are no images."""
    root = tmp_path_factory.mktemp("damaged")
    samples = [
        (key, b"no image" if number in NO_IMAGES else image, label)
        for number, (key, image, label) in enumerate(casts(37, 2))
    ]
    write_split(root / "val", iter(samples), shard_samples=20, classes=4)
    return root


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_what_cannot_be_read_does_not_count_and_is_named_once_at_any_number_of_ranks(
    cast_shards: Path, damaged: Path, world_size: int
) -> None:
    (batch,) = eval_loader(
        ShardIndex.load(cast_shards / "val"), 0, 1, eval_transform(IMAGES, 32), batch=1000, workers=0
    )
    read = [number for number in range(37) if number not in NO_IMAGES]
    with torch.no_grad():
        logits = model()(Normalize(IMAGES.mean, IMAGES.std, torch.device("cpu"), torch.float32)(batch.images))[read]
    labels = batch.labels[read]
    for result in spawn(evaluate_on_ranks, world_size, damaged):
        assert (result.samples, result.unreadable) == (len(read), len(NO_IMAGES))
        assert result.top1 == pytest.approx(100 * float((logits.argmax(dim=1) == labels).float().mean()))
        assert result.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
        assert [int(item.key.partition(".")[0]) for item in result.bad] == sorted(NO_IMAGES)


@pytest.mark.parametrize(
    ("unreadable", "samples", "fraction", "passes"),
    [
        (1, 37, 0.001, True),
        (6, 37, 0.001, False),
        (8, 50_000, 0, True),
        (51, 50_000, 0.001, False),
        (50, 50_000, 0.001, True),
        (6, 10, 0.5, False),
        (37, 40, 1.0, True),
    ],
)
def test_too_many_are_more_than_the_recipe_s_share_and_a_few(
    unreadable: int, samples: int, fraction: float, passes: bool
) -> None:
    bad = tuple(BadSample("val-000000.tar", f"{number:06d}.png", "odd") for number in range(unreadable))
    problem = Evaluation(50.0, 90.0, 1.0, samples - unreadable, unreadable, bad).problem(fraction)
    assert (problem == "") == passes
    assert passes or f"{unreadable} of {samples:,} samples could not be read" in problem


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "crate_dist.evaluate", *map(str, arguments)]
    return subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def on_two_ranks(*arguments: object) -> tuple[list[int], list[str], list[str]]:
    """Exit status, stdout and stderr of each."""
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "crate_dist.evaluate", *map(str, arguments)],
            cwd=REPOSITORY,
            env={**os.environ, **rank_environment(rank, 2, port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120) for rank in ranks]
    return [rank.returncode for rank in ranks], [out for out, _ in said], [err for _, err in said]


def test_the_command_takes_a_run_a_checkpoint_an_export_and_a_published_checkpoint(
    cast_shards: Path, small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    settings = ("--set", "images.resize_filter=bilinear")
    train_to_the_end(["--config", small_recipe, "--data", cast_shards, "--run-dir", run, *settings], world_size=1)
    exported = torch.load(run / "model-last.pt", weights_only=True)
    assert {load_trained(source).images.resize_filter for source in (run, run / "model-last.pt")} == {"bilinear"}
    net = model()
    net.load_state_dict(exported["state_dict"])
    export_reference(tmp_path / "reference.pth.tar", net.config, net.state_dict())
    outputs = []
    for source, extra in (
        (run, ()),
        (run / "checkpoints" / "step-00000025", ()),
        (run / "model-last.pt", ("--data", cast_shards)),
    ):
        done = command(source, *extra)
        assert done.returncode == 0, done.stderr
        assert "37 samples" in done.stdout
        assert "images/s" in done.stdout
        outputs.append(done.stdout.partition(": ")[2].partition(";")[0])
    (tmp_path / "link").symlink_to(run / "checkpoints" / "step-00000025")
    monkeypatch.chdir(run / "checkpoints")
    for source in (Path("step-00000025"), tmp_path / "link"):
        assert load_trained(source).images.eval_crop == 1.0
    check_init_from(tmp_path / "link", load_recipe(small_recipe))
    monkeypatch.chdir("step-00000025")
    assert load_trained(Path()).images.eval_crop == 1.0
    assert len(set(outputs)) == 1, outputs
    done = command(tmp_path / "reference.pth.tar", "--data", cast_shards)
    assert "37 samples" in done.stdout, done.stderr


def test_ranks_print_and_write_the_classes_and_confusions_that_one_process_does(
    cast_shards: Path, tmp_path: Path
) -> None:
    net = model()
    export_model(tmp_path / "model.pt", net.config, net.state_dict(), {"eval_crop": 1.0})
    shown = (tmp_path / "model.pt", "--data", cast_shards, "--worst", 2, "--confusions", 3)
    alone = command(*shown, "--json", tmp_path / "alone.json", "--csv", tmp_path / "alone.csv")
    assert alone.returncode == 0, alone.stderr
    one = json.loads((tmp_path / "alone.json").read_text())
    status, outputs, _ = on_two_ranks(*shown, "--json", tmp_path / "both.json")
    assert status == [0, 0]
    both = json.loads((tmp_path / "both.json").read_text())
    for name in ("top1", "top5", "samples", "unreadable", "classes", "confusions"):
        assert both[name] == one[name], name
    assert (one["ranks"], both["ranks"]) == (1, 2)
    assert "on each of 2 ranks" in outputs[0]
    assert outputs[1] == ""
    assert alone.stdout.splitlines()[1:] == outputs[0].splitlines()[1:]

    assert sum(entry["samples"] for entry in one["classes"]) == one["samples"] == 37
    right = sum(entry["samples"] * entry["top1"] for entry in one["classes"]) / 37
    assert right == pytest.approx(one["top1"])
    assert sum(entry["count"] for entry in one["confusions"]) == round(37 * (1 - one["top1"] / 100))
    table = list(csv.DictReader((tmp_path / "alone.csv").read_text().splitlines()))
    assert [float(row["top1"]) for row in table] == [entry["top1"] for entry in one["classes"]]
    lines = alone.stdout.splitlines()
    classes, confusions = lines.index(""), lines.index("", lines.index("") + 1)
    assert confusions - classes == 4  # a heading, and the two worst
    worst = min(one["classes"], key=lambda entry: (entry["top1"], entry["label"]))
    assert lines[classes + 2].split()[0] == f"{worst['top1']:.2f}"
    first = one["confusions"][0]
    assert lines[confusions + 2].endswith(f"{first['true']} -> {first['predicted']}")


def test_what_cannot_be_evaluated_is_named(
    cast_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = model()
    export_model(tmp_path / "model.pt", net.config, net.state_dict())
    for arguments, expected in (
        ((tmp_path / "nothing.pt", "--data", cast_shards), "nothing.pt"),
        ((tmp_path, "--data", cast_shards), "manifest.json"),
        ((tmp_path / "model.pt", "--data", tmp_path), "no folder"),
        ((tmp_path / "model.pt",), "no data folder"),
        ((tmp_path / "model.pt", "--data", cast_shards, "--json", tmp_path / "no" / "out"), "no folder to write in"),
    ):
        assert main([str(argument) for argument in arguments]) == 1
        assert expected in capsys.readouterr().err


def test_too_many_unreadable_samples_are_an_error_unless_more_are_allowed(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = model()
    export_model(tmp_path / "model.pt", net.config, net.state_dict(), {"eval_crop": 1.0})
    line = [str(tmp_path / "model.pt"), "--data", str(damaged), "--workers", "0"]
    assert main([*line, "--json", str(tmp_path / "out.json")]) == 1
    said = capsys.readouterr()
    assert "6 of 37 samples could not be read, the first one 000003.png of val-000000.tar" in said.err
    assert "--max-bad-fraction, now 0.001, lets more pass" in said.err
    assert said.out == ""
    assert not (tmp_path / "out.json").exists()
    found, out = scored(capsys, tmp_path, *line, "--max-bad-fraction", 0.2)
    assert "6 of 37 samples could not be read and do not count: 000003.png of val-000000.tar, " in out
    assert (found["samples"], found["unreadable"], len(found["bad"])) == (31, 6, 6)
    assert sum(entry["samples"] for entry in found["classes"]) == 31


def test_an_accuracy_of_scores_that_are_not_numbers_is_never_the_best() -> None:
    assert Evaluation(50.0, 90.0, 1.0, 37, 0, ()).better_than(-1.0)
    assert not Evaluation(50.0, 90.0, float("nan"), 37, 0, ()).better_than(-1.0)


def test_weights_that_are_not_finite_have_no_accuracy(
    cast_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = model()
    torch.nn.init.constant_(net.head.linear.weight, torch.nan)
    export_model(tmp_path / "model.pt", net.config, net.state_dict(), {"eval_crop": 1.0})
    line = [tmp_path / "model.pt", "--data", cast_shards, "--workers", "0", "--json", tmp_path / "out.json"]
    assert main([*map(str, line)]) == 1
    assert "is nan: weights that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def trained_on(folder: Path, classes: list[str] | None) -> tuple[Path, Transformer]:
    """A file of a model of six outputs, for classes of these names."""
    net = build_model(ModelSection(arch="crate_demo", image_size=32, patch_size=8), 6, seed=3).eval()
    meta = {"eval_crop": 1.0} | ({"classes": classes} if classes else {})
    export_model(folder / "model.pt", net.config, net.state_dict(), meta)
    return folder / "model.pt", net


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with val/, 24 samples of the classes "0" and "1"."""
    root = tmp_path_factory.mktemp("two")
    write_split(root / "val", (sample for sample in casts(48, 2) if sample[2] < 2), shard_samples=20, classes=2)
    return root


def scored(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> tuple[dict[str, Any], str]:
    """Returns what the command writes and says."""
    assert main([*map(str, arguments), "--workers", "0", "--json", str(folder / "out.json")]) == 0
    return json.loads((folder / "out.json").read_text()), capsys.readouterr().out


@pytest.mark.parametrize("all_classes", [False, True])
def test_classes_are_matched_by_name_and_the_data_s_alone_compete_unless_all_are_asked_for(
    two_classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], all_classes: bool
) -> None:
    source, net = trained_on(tmp_path, ["x", "1", "y", "0", "z", "w"])
    flags = ["--all-classes"] if all_classes else []
    found, said = scored(capsys, tmp_path, source, "--data", two_classes, "--confusions", 9, *flags)
    (batch,) = eval_loader(
        ShardIndex.load(two_classes / "val"), 0, 1, eval_transform(IMAGES, 32), batch=1000, workers=0
    )
    with torch.no_grad():
        logits = net(Normalize(IMAGES.mean, IMAGES.std, torch.device("cpu"), torch.float32)(batch.images))
    right = torch.tensor([3, 1])[batch.labels]  # the outputs that are called "0" and "1"
    competing = logits if all_classes else logits.masked_fill(~torch.eye(6)[[1, 3]].any(dim=0), -torch.inf)
    assert found["top1"] == pytest.approx(100 * float((competing.argmax(dim=1) == right).float().mean()))
    assert found["loss"] == pytest.approx(float(F.cross_entropy(competing, right)), rel=1e-5)
    assert (found["matched_by"], found["competing"], found["model_classes"]) == ("name", 6 if all_classes else 2, 6)
    assert f"matched by name; {6 if all_classes else 2} of the model's 6 compete" in said
    predicted = {item["predicted"] for item in found["confusions"]}
    assert predicted <= (set("xyzw01") if all_classes else set("01"))


def test_the_same_classes_in_another_order_score_the_same(
    two_classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = trained_on(tmp_path, ["x", "1", "y", "0", "z", "w"])
    ordered, _ = scored(capsys, tmp_path, source, "--data", two_classes)
    index = ShardIndex.load(two_classes / "val")
    rows = np.array(index.rows)
    rows["label"] = 1 - rows["label"]
    (tmp_path / "turned").mkdir()
    shutil.copytree(two_classes / "val", tmp_path / "turned/val")
    ShardIndex(tmp_path / "turned/val", index.shards, rows, ["1", "0"], ["1", "0"]).save()
    turned, _ = scored(capsys, tmp_path, source, "--data", tmp_path / "turned")
    assert (turned["top1"], turned["loss"]) == (ordered["top1"], pytest.approx(ordered["loss"]))


def test_a_file_without_names_goes_by_position_and_says_so(
    two_classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = trained_on(tmp_path, None)
    found, said = scored(capsys, tmp_path, source, "--data", two_classes)
    assert (found["matched_by"], found["competing"]) == ("position", 2)
    assert "by position, as the model does not tell the names of its classes; 2 of the model's 6 compete" in said
    _, image, _ = next(iter(casts(1, 3)))
    for name in ("zero", "one", "two", "three", "four", "five"):
        (tmp_path / "six" / name).mkdir(parents=True)
        (tmp_path / "six" / name / "1.jpg").write_bytes(image)
    shutil.copytree(tmp_path / "six/two", tmp_path / "two/two")
    found, said = scored(capsys, tmp_path, source, "--data", tmp_path / "six", "--also", tmp_path / "two")
    assert [found["matched_by"], found["also"][0]["matched_by"]] == ["position", "position"]
    assert (found["competing"], found["also"][0]["competing"]) == (6, 1)
    first, second = (line for line in said.splitlines() if line.startswith("classes are matched by position"))
    assert "alphabetical order, which may not be the model's; 6 of the model's 6 compete" in first
    assert "alphabetical" not in second


def test_classes_with_numbers_for_names_go_by_position_and_are_said(
    two_classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for classes, competing in (("01", 6), ("0123", 2)):  # all outputs, as in training, where there are as many classes
        source, _ = trained_on(tmp_path, list(classes))
        found, said = scored(capsys, tmp_path, source, "--data", two_classes)
        assert (found["matched_by"], found["competing"]) == ("number", competing)
        assert f"have numbers for names; {competing} of the model's 6 compete" in said
    named = tmp_path / "named/val"
    shutil.copytree(two_classes / "val", named)
    index = ShardIndex.load(named)
    ShardIndex(named, index.shards, index.rows, ["cat", "dog"], ["cat", "dog"]).save()
    assert main([str(source), "--data", str(named.parent)]) == 1  # two of four: nobody can tell which
    assert "cannot be told: the model does not name them" in capsys.readouterr().err
    source, _ = trained_on(tmp_path, ["0", "1"])
    assert scored(capsys, tmp_path, source, "--data", named.parent)[0]["matched_by"] == "number"
    source, _ = trained_on(tmp_path, ["cat", "dog"])  # the classes of training; more outputs than these
    found, said = scored(capsys, tmp_path, source, "--data", named.parent)
    assert (found["matched_by"], found["competing"]) == ("order", 6)
    assert "match" not in said


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (["a", "b", "c", "d", "e", "0"], "does not know 1 of the 2 classes of .*: '1'; it knows 'a', 'b'"),
        (["cat", "dog"], "does not know 2 of the 2 classes of .*: '0', '1'; .*--classes FILE"),
        (["0", "1", "0"], "'0' is the name of several classes"),
        (list("0123456"), "names 7 classes, and has 6 outputs"),
        (["0"], "has 2 classes, the model only 1"),
    ],
)
def test_classes_that_the_model_does_not_know_are_refused(
    two_classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], classes: list[str], expected: str
) -> None:
    source, _ = trained_on(tmp_path, classes)
    for flags in ([], ["--all-classes"]):
        assert main([str(source), "--data", str(two_classes), *flags]) == 1
        assert re.search(expected, capsys.readouterr().err)


def test_heads_that_a_file_does_not_tell_are_asked_for(
    cast_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(to_reference(model().state_dict()), tmp_path / "bare.pth")
    assert main([str(tmp_path / "bare.pth"), "--data", str(cast_shards)]) == 1
    assert "--heads" in capsys.readouterr().err
    found, _ = scored(capsys, tmp_path, tmp_path / "bare.pth", "--data", cast_shards, "--heads", 4)
    assert found["samples"] == 37
    for program in ("probe", "figures"):
        done = subprocess.run(
            [sys.executable, "-m", f"crate_dist.{program}"]
            + (["knn"] if program == "probe" else ["layers", "--out", str(tmp_path / "out")])
            + [str(tmp_path / "bare.pth"), "--data", str(cast_shards)],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 1
        assert "--heads" in done.stderr


def test_a_split_that_does_not_decode_on_one_rank_ends_all_with_a_line(tmp_path: Path) -> None:
    samples = [
        (key, image if number < 20 else b"no image", label) for number, (key, image, label) in enumerate(casts(40, 1))
    ]
    write_split(tmp_path / "val", iter(samples), shard_samples=40, classes=4)
    net = model()
    export_model(tmp_path / "model.pt", net.config, net.state_dict(), {"eval_crop": 1.0})
    status, _, errors = on_two_ranks(tmp_path / "model.pt", "--data", tmp_path)
    assert status == [1, 1]
    assert "16 samples in a row do not decode" in errors[1]
    assert "rank 0 has lost another rank" in errors[0]
    assert "Traceback" not in errors[0] + errors[1]
