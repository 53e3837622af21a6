"""ImageNet's variants are evaluated where they lie, each in its published layout, and stand in one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from crate_dist.checkpoint.trained import load_trained
from crate_dist.config import ImageSection, ModelSection
from crate_dist.data.folder import class_folders
from crate_dist.data.index import ShardError, ShardIndex
from crate_dist.data.loader import Normalize, eval_transform
from crate_dist.evaluate import main
from crate_dist.evaluation.accuracy import Evaluation
from crate_dist.evaluation.corruptions import ALEXNET_ERRORS, SEVERITIES, Corrupted, Corruptions
from crate_dist.evaluation.on_ranks import CannotMeasure, Frozen
from crate_dist.evaluation.real import RealLabels
from crate_dist.evaluation.throughput import measure_throughput
from crate_dist.models.build import build_model
from crate_dist.models.transformer import Transformer
from crate_dist.models.weights.write import export_model
from crate_dist.world import World
from tests.conftest import casts, write_split

WNIDS = [f"n{9 * number + 1_440_764:08d}" for number in range(1000)]
"""As many as ImageNet has, in order."""
CROP = 0.5
WHOLE = ImageSection(eval_crop=1.0)
CPU = torch.device("cpu")


def model(classes: list[str] | None, folder: Path, name: str = "model.pt") -> tuple[Path, Transformer]:
    """A file of a model of a thousand outputs, which has opinions."""
    net = build_model(ModelSection(arch="crate_demo", image_size=32, patch_size=8), 1000, seed=3).eval()
    torch.nn.init.normal_(net.head.linear.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    meta = {"eval_crop": CROP} | ({"classes": classes} if classes else {})
    export_model(folder / name, net.config, net.state_dict(), meta)
    return folder / name, net


def tree(root: Path, classes: list[str], seed: int, suffix: str = "JPEG") -> list[tuple[bytes, str]]:
    """Writes three images for each class folder; returns them with their class."""
    images = []
    for number, (_, image, _) in enumerate(casts(3 * len(classes), seed)):
        name = classes[number // 3]
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / f"{number}.{suffix}").write_bytes(image)
        images.append((image, name))
    return images


def by_hand(
    net: Transformer, images: list[tuple[bytes, int]], competing: set[int], prepared: ImageSection | None = None
) -> dict[str, Any]:
    """Top-1 and loss where the outputs `competing` do."""
    transform = eval_transform(prepared or ImageSection(eval_crop=CROP), 32)
    pixels = torch.from_numpy(np.stack([transform(image) for image, _ in images]))
    section = ImageSection()
    with torch.no_grad():
        logits = net(Normalize(section.mean, section.std, CPU, torch.float32)(pixels))
    logits[:, [output for output in range(1000) if output not in competing]] = -torch.inf
    labels = torch.tensor([output for _, output in images])
    top1 = 100 * float((logits.argmax(dim=1) == labels).float().mean())
    return {"top1": pytest.approx(top1), "loss": pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-4)}


def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: object) -> tuple[dict[str, Any], str]:
    """What the command writes and says."""
    status = main([*map(str, arguments), "--workers", "0", "--json", str(tmp_path / "out.json")])
    said = capsys.readouterr()
    assert status == 0, said.err
    return json.loads((tmp_path / "out.json").read_text()), said.out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([*map(str, arguments), "--workers", "0"]) == 1
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 24 validation images, whose keys hold their original names, of the first four of a thousand classes."""
    root = tmp_path_factory.mktemp("imagenet")
    samples = (
        (f"{place:08d}-ILSVRC2012_val_{50_000 - place:08d}", image, label)
        for place, (_, image, label) in enumerate(casts(24, seed=5))
    )
    index = write_split(root / "val", samples, shard_samples=20, classes=1000)
    ShardIndex(index.root, index.shards, index.rows, WNIDS, WNIDS).save()
    return root


def test_every_variant_in_its_layout_is_scored_as_by_hand_and_all_stand_in_one_table(
    imagenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order = WNIDS[500:] + WNIDS[:500]  # a model need not have them sorted
    source, net = model(order, tmp_path)
    output = {name: number for number, name in enumerate(order)}
    v2 = tree(tmp_path / "imagenetv2", ["0", "1", "2", "10", "100", "999"], 1, "jpeg")
    a = tree(tmp_path / "imagenet-a", WNIDS[30:50:5], 2, "jpg")
    (tmp_path / "imagenet-a/README.txt").write_text("a file beside the folders")
    sketch = tree(tmp_path / "imagenet-sketch/sketch", WNIDS[100:110], 3)
    corrupted = {
        (corruption, severity): tree(tmp_path / "imagenet-c" / kind / corruption / str(severity), WNIDS[:2], severity)
        for kind, corruption in (("blur", "glass_blur"), ("weather", "fog"))
        for severity in SEVERITIES
    }
    labels: list[list[int]] = [[] for _ in range(50_000)]
    labels[50_000 - 1], labels[50_000 - 2] = list(range(1000)), [7, 8]  # of the first two samples
    (tmp_path / "real.json").write_text(json.dumps(labels))
    sets = [tmp_path / name for name in ("imagenetv2", "imagenet-a", "imagenet-sketch", "imagenet-c")]
    found, said = run(
        capsys, tmp_path, source, "--data", imagenet, "--real", tmp_path / "real.json", "--also", *sets, "--reliability"
    )

    of_v2, of_a, of_sketch, of_c = found["also"]
    for record, images, names in (
        (of_v2, [(image, WNIDS[int(name)]) for image, name in v2], {0, 1, 2, 10, 100, 999}),
        (of_a, a, range(30, 50, 5)),
        (of_sketch, sketch, range(100, 110)),
    ):
        wanted = by_hand(net, [(image, output[name]) for image, name in images], {output[WNIDS[n]] for n in names})
        assert {key: record[key] for key in wanted} == wanted, record["data"]
        assert record["samples"] == len(images)
    assert [record["matched_by"] for record in found["also"]] == ["wordnet", "name", "name", "name"]
    for (corruption, severity), images in corrupted.items():
        pairs = [(image, output[name]) for image, name in images]
        wanted = by_hand(net, pairs, {output[name] for name in WNIDS[:2]}, WHOLE)  # not cropped once more
        assert 100 - of_c["corruptions"][corruption]["by_severity"][str(severity)] == wanted["top1"]
    assert of_c["mce"] is None
    assert "no mCE: that takes all 15 corruptions" in said

    assert found["real"]["samples"] == 2
    assert found["real"]["top1"] in (50, 100)  # any class is right for the first of both
    assert 0 <= found["calibration"]["ece"] <= 100
    table = said[said.rindex("\ndata ") :].splitlines()
    first = [f"{imagenet.name}/val", "ReaL", "imagenetv2", "imagenet-a", "imagenet-sketch/sketch", "imagenet-c"]
    assert [line.split()[0] for line in table[2:]] == first
    assert f"{of_a['top1']:.2f} %" in table[5]
    assert table[5].endswith("4 of 1,000")


def test_the_crop_and_the_filter_may_be_others_than_in_training_and_are_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = WNIDS[:3]
    source, net = model(WNIDS, tmp_path)
    images = [(image, classes.index(name)) for image, name in tree(tmp_path / "data", classes, seed=3)]
    line = (source, "--data", tmp_path / "data", "--all-classes")
    as_trained, _ = run(capsys, tmp_path, *line)
    assert as_trained["images"] == ImageSection(eval_crop=CROP).model_dump(mode="json")
    whole, _ = run(capsys, tmp_path, *line, "--crop", 1.0, "--resize-filter", "bilinear")
    assert whole["images"] == ImageSection(eval_crop=1.0, resize_filter="bilinear").model_dump(mode="json")
    expected = by_hand(net, images, set(range(1000)), ImageSection(eval_crop=1.0, resize_filter="bilinear"))
    assert {key: whole[key] for key in expected} == expected
    assert whole["loss"] != as_trained["loss"]
    for crop in ("1.5", "1e-9", "nan", "x"):
        with pytest.raises(SystemExit):
            main([*map(str, line), "--crop", crop])
        assert f"{crop} is no share of the short side, from 0.05 to 1" in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_evaluated(
    imagenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = model(WNIDS, tmp_path)
    tree(tmp_path / "c/snow/1", WNIDS[:2], 0)
    tree(tmp_path / "c/snow/3", WNIDS[:2], 0)
    assert main([str(source), "--data", str(imagenet), "--also", str(tmp_path / "c"), "--dry-run"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{imagenet / 'val'}: 24 images of 1,000 classes"
    assert "c: 6 images of 2 classes in each of 2 folders; classes are matched by name" in second


def test_a_model_that_does_not_name_its_classes_takes_the_names_of_data_or_is_refused(
    imagenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare, _ = model(None, tmp_path, "bare.pt")
    named, _ = model(WNIDS, tmp_path)
    tree(tmp_path / "imagenet-r", WNIDS[10:14], 2)
    assert "cannot be told: the model does not name them" in refused(capsys, bare, "--data", tmp_path / "imagenet-r")
    scores = [
        run(capsys, tmp_path, source, "--data", imagenet, "--also", tmp_path / "imagenet-r")[0]["also"][0]["loss"]
        for source in (bare, named)
    ]
    assert scores[0] == scores[1]
    tree(tmp_path / "v2", ["3", "20"], 2)
    found, _ = run(capsys, tmp_path, bare, "--data", tmp_path / "v2")
    wanted, _ = run(capsys, tmp_path, named, "--data", tmp_path / "v2")
    assert (found["matched_by"], wanted["matched_by"]) == ("position", "wordnet")
    assert found["loss"] == wanted["loss"]


def test_what_is_no_data_set_or_no_real_labels_is_named(
    imagenet: Path, cast_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = model(WNIDS, tmp_path)
    tree(tmp_path / "hole", WNIDS[:2], 0)
    (tmp_path / "hole" / WNIDS[2]).mkdir()
    tree(tmp_path / "twice/blur/fog/1", WNIDS[:2], 0)
    tree(tmp_path / "twice/fog/1", WNIDS[:2], 0)
    (tmp_path / "empty").mkdir()
    for name, expected in (
        ("hole", f"no image in {WNIDS[2]} of"),
        ("twice", "holds fog twice"),
        ("empty", "no folder"),
        ("nowhere", "no folder"),
    ):
        assert expected in refused(capsys, source, "--data", imagenet, "--also", tmp_path / name)
    for text, expected in (("{", "is no JSON"), ("[[1]]", "expected a list of 50,000 lists")):
        (tmp_path / "real.json").write_text(text)
        assert expected in refused(capsys, source, "--data", imagenet, "--real", tmp_path / "real.json")
    (tmp_path / "real.json").write_text(json.dumps([[]] * 50_000))
    tree(tmp_path / "other", [*WNIDS], 0)
    assert "goes by the names of ImageNet's" in refused(
        capsys, source, "--data", tmp_path / "other", "--real", tmp_path / "real.json"
    )
    index, turned = ShardIndex.load(imagenet / "val"), WNIDS[::-1]
    for names, first in ((WNIDS, [0, 1]), (turned, [999, 998]), (list(map(str, range(1000))), [0, 1])):
        called = ShardIndex(index.root, index.shards, index.rows, names, names)
        assert RealLabels.read(tmp_path / "real.json", called).numbers[:2].tolist() == first
    words = [f"word{name[::-1]}" for name in WNIDS]  # whose order says nothing
    with pytest.raises(CannotMeasure, match=f"its first '{words[0]}': which is which cannot be told"):
        RealLabels.read(tmp_path / "real.json", ShardIndex(index.root, index.shards, index.rows, words, words))


def evaluation(error: float, images: int = 50_000) -> Evaluation:
    return Evaluation(100 - error, 100.0, 1.0, images, 0, ())


def test_the_mce_of_alexnet_is_100_and_of_half_its_errors_50_and_of_a_part_there_is_none() -> None:
    for factor in (1, 0.5):
        results = {
            name: {severity: evaluation(factor * error) for severity in SEVERITIES}
            for name, error in ALEXNET_ERRORS.items()
        }
        assert Corrupted(results).mce == pytest.approx(100 * factor)
        of_severities = (10, 30, 50, 20, 40)
        fog = {severity: evaluation(error) for severity, error in zip(SEVERITIES, of_severities, strict=True)}
        whole = Corrupted(results | {"fog": fog})
        assert whole.corruption_error("fog") == pytest.approx(100 * 30 / ALEXNET_ERRORS["fog"])
        assert whole.mce == pytest.approx((14 * 100 * factor + 100 * 30 / ALEXNET_ERRORS["fog"]) / 15)
        del fog[3]
        part = Corrupted(results | {"fog": fog})
        assert part.mce is part.corruption_error("fog") is None
        assert part.error("fog") == 25
        few = Corrupted(results | {"fog": dict.fromkeys(SEVERITIES, evaluation(30, 49_999))})
        assert few.mce is few.corruption_error("fog") is None


def test_imagenet_c_is_found_whole_in_one_folder_or_in_one_for_each_kind(tmp_path: Path) -> None:
    for number, name in enumerate(ALEXNET_ERRORS):
        for severity in SEVERITIES:
            (tmp_path / "flat" / name / str(severity)).mkdir(parents=True)
            (tmp_path / "packed" / f"kind{number % 4}" / name / str(severity)).mkdir(parents=True)
    (tmp_path / "packed/extra/spatter/1").mkdir(parents=True)
    for layout in ("flat", "packed"):
        found = Corruptions.find(tmp_path / layout)
        assert found is not None
        assert list(found.folders) == list(ALEXNET_ERRORS)
        assert len(found) == 75
    (tmp_path / "flat/fog/5").rmdir()
    part = Corruptions.find(tmp_path / "flat")
    assert part is not None
    assert list(part.folders["fog"]) == [1, 2, 3, 4]
    assert Corruptions.find(tmp_path / "flat/fog") is None  # classes 1 … 4, as there are none in these
    for severity in range(1, 5):
        (tmp_path / f"flat/fog/{severity}").rmdir()
    with pytest.raises(ShardError, match="none of the folders 1 to 5"):
        Corruptions.find(tmp_path / "flat")


def test_one_corruption_or_severity_is_not_cropped_either_and_classes_may_be_called_as_corruptions(
    imagenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, net = model(WNIDS, tmp_path)
    images = {n: tree(tmp_path / f"c/fog/{n}", WNIDS[:2], n) for n in (1, 3)}
    tree(tmp_path / "c/spatter/1", WNIDS[:2], 1)
    parts = [tmp_path / "c" / name for name in ("fog", "fog/3", "spatter")]
    found, said = run(capsys, tmp_path, source, "--data", imagenet, "--also", *parts)
    pairs = [(image, WNIDS.index(name)) for image, name in images[3]]
    error = 100 - by_hand(net, pairs, {0, 1}, WHOLE)["top1"].expected
    whole, one, extra = (record["corruptions"] for record in found["also"])
    assert whole["fog"]["by_severity"].keys() == {"1", "3"}
    assert whole["fog"]["by_severity"]["3"] == one["fog"]["by_severity"]["3"] == pytest.approx(error)
    assert extra["spatter"]["by_severity"].keys() == {"1"}
    assert "\nfog/3 " in said
    for flags in (["--csv", tmp_path / "a.csv", "--worst", 3], ["--real", tmp_path / "real.json"]):
        words = refused(capsys, source, "--data", tmp_path / "c", *flags)
        assert "give the shards as --data, and ImageNet-C as --also" in words
    assert not (tmp_path / "a.csv").exists()
    weather = [*(f"class{number}" for number in range(997)), "fog", "frost", "snow"]
    tree(tmp_path / "weather", weather[-4:], 1)
    source, _ = model(weather, tmp_path)
    assert run(capsys, tmp_path, source, "--data", tmp_path / "weather")[0]["matched_by"] == "name"


def test_folders_called_by_numbers_stand_in_the_order_of_these(tmp_path: Path) -> None:
    for name in ("10", "9", "100", "0", ".hidden"):
        (tmp_path / name).mkdir()
    assert class_folders(tmp_path) == ["0", "9", "10", "100"]


def test_throughput_is_told_as_it_is_and_compiled_where_that_works(tmp_path: Path) -> None:
    source, _ = model(None, tmp_path)
    trained = load_trained(source)
    normalize = Normalize((0.5,) * 3, (0.5,) * 3, CPU, torch.float32)
    frozen = Frozen(trained.model.eval(), "model", World(0, 1, 0, 1, "", 0, ""), CPU, trained.images, 4, 0, normalize)
    tried: list[object] = []

    def compiles(once: Any) -> bool:
        tried.append(once())
        return True

    speed = measure_throughput(frozen, compiles, seconds=0.01)
    assert tried[0].shape == (4, 1000)  # type: ignore[attr-defined]
    assert speed.compiled is not None
    assert f"{speed.compiled:,.0f} with torch.compile" in speed.describe()
    assert "does not work here" in measure_throughput(frozen, lambda once: False, seconds=0.01).describe()
