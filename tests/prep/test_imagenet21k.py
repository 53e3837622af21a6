"""data_prep/imagenet21k.py on small copies of the layouts that ImageNet-21K is met in."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from crate_dist.data.index import ShardIndex
from tests.data_prep import convert, picture, read_by_index, refuse, tar_of, tars_of, write_tree

PROGRAM = "imagenet21k.py"
WNIDS = ["n00004475", "n00005787", "n00006024", "n00006484"]
IMAGES = {wnid: {f"{wnid}_{i}.JPEG": picture(10 * label + i) for i in range(6)} for label, wnid in enumerate(WNIDS[:3])}
IMAGES[WNIDS[0]][f"{WNIDS[0]}_90.JPEG"] = picture(90, mode="CMYK")
IMAGES[WNIDS[1]][f"{WNIDS[1]}_91.JPEG"] = picture(91, format="PNG")
IMAGES[WNIDS[3]] = {}
WORDS = b"n00001740\tentity\nn00004475\torganism, being\nn00005787\tbenthos\n"
OPTIONS = ("--shard-samples", 6, "--workers", 1)


def class_tars() -> dict[str, bytes]:
    return {f"{wnid}.tar": tar_of(dict(reversed(files.items()))) for wnid, files in IMAGES.items()}


def fall(root: Path) -> Path:
    """One archive of class tars, in an order of its own."""
    return write_tree(root, {"fall11_whole.tar": tar_of(dict(reversed(class_tars().items()))), "words.txt": WORDS})


def winter(root: Path) -> Path:
    """The folder that winter21_whole.tar.gz unpacks to."""
    return write_tree(root, {f"winter21_whole/{name}": data for name, data in class_tars().items()})


def unpacked(root: Path) -> Path:
    """Class folders, and one class that is still packed."""
    files = {f"{wnid}/{name}": data for wnid in WNIDS[:2] for name, data in IMAGES[wnid].items()}
    (root / WNIDS[3]).mkdir(parents=True)
    return write_tree(root, files | {f"{WNIDS[2]}.tar": class_tars()[f"{WNIDS[2]}.tar"]})


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The shards that the archive of fall 2011 gives."""
    root = tmp_path_factory.mktemp("expected")
    done = convert(PROGRAM, fall(root / "in"), root / "out", *OPTIONS, "--val-per-class", 2)
    assert "ImageNet-21K of fall11_whole, one archive" in done.stdout
    assert "4 classes of 21,841: a subset" in done.stderr
    assert "1 class has no image and keep their labels: n00006484" in done.stderr
    train, val = ShardIndex.load(root / "out/train"), ShardIndex.load(root / "out/val")
    assert train.classes == val.classes == WNIDS
    assert train.class_names[:3] == ["organism, being", "benthos", "n00006024"]
    assert sorted(label for _, label in read_by_index(root / "out/val")) == [0, 0, 1, 1, 2, 2]
    counted = {**train.made_by["counted"]}
    for name, number in val.made_by["counted"].items():
        counted[name] = counted.get(name, 0) + number
    assert counted == {"CMYK": 1, "PNG": 1, "re-encoded": 2}
    return tars_of(root / "out")


@pytest.mark.parametrize("layout", [winter, unpacked])
def test_every_layout_gives_the_same_shards(tmp_path: Path, expected: dict[str, str], layout: object) -> None:
    assert callable(layout)
    convert(PROGRAM, layout(tmp_path / "in"), tmp_path / "out", *OPTIONS, "--val-per-class", 2)
    assert tars_of(tmp_path / "out") == expected


def test_parts_of_the_archive_give_the_same_shards(tmp_path: Path, expected: dict[str, str]) -> None:
    source = fall(tmp_path / "in") / "fall11_whole.tar"
    for part in ("2/2", "1/2"):
        convert(PROGRAM, source, tmp_path / "out", *OPTIONS, "--val-per-class", 2, "--part", part)
    assert tars_of(tmp_path / "out") == expected


def test_a_list_of_classes_decides_which_are_taken_and_their_labels(tmp_path: Path) -> None:
    chosen = [WNIDS[2], "n09999999", WNIDS[0]]
    (tmp_path / "classes.txt").write_text("\n".join(chosen))
    done = convert(PROGRAM, winter(tmp_path / "in"), tmp_path / "out", "--classes", tmp_path / "classes.txt")
    train = ShardIndex.load(tmp_path / "out/train")
    assert train.classes == chosen
    labels = dict(read_by_index(tmp_path / "out/train"))
    assert [labels[IMAGES[wnid][f"{wnid}_1.JPEG"]] for wnid in (WNIDS[2], WNIDS[0])] == [0, 2]
    assert set(labels.values()) == {0, 2}
    assert "2 classes are not in --classes and left out" in done.stderr
    assert "no validation split is published: --val-per-class 50" in done.stderr
    (tmp_path / "classes.txt").write_text("tench\n")
    given = ("--source", tmp_path / "in", "--out", tmp_path / "x", "--classes", tmp_path / "classes.txt")
    assert "--classes: expected ids like n00004475, one a line, and not tench" in refuse(PROGRAM, *given)


@pytest.mark.parametrize("named", [True, False])
def test_a_compressed_archive_is_refused_with_the_command_that_unpacks_it(
    tmp_path: Path, expected: dict[str, str], named: bool
) -> None:
    folder = tmp_path / "my data"
    tars = {f"winter21_whole/{name}": data for name, data in class_tars().items()}
    archive = write_tree(folder, {"winter21_whole.tar.gz": tar_of(tars, "w:gz")}) / "winter21_whole.tar.gz"
    error = refuse(PROGRAM, "--source", archive if named else folder, "--out", tmp_path / "out")
    said = re.search(r"`(tar .*)`, then give --source (.*)$", error, re.MULTILINE)
    assert said
    subprocess.run(said[1], shell=True, check=True)
    convert(PROGRAM, Path(said[2]), tmp_path / "out", *OPTIONS, "--val-per-class", 2)
    assert tars_of(tmp_path / "out") == expected


def test_what_is_not_imagenet_21k_is_said_with_what_was_found(tmp_path: Path) -> None:
    pets = write_tree(tmp_path / "pets", {"cat/a.jpg": picture(1)})
    error = refuse(PROGRAM, "--source", pets, "--out", tmp_path / "out")
    assert "is not ImageNet-21K" in error
    assert "found cat/" in error
    empty = write_tree(tmp_path / "empty", {f"{WNIDS[3]}.tar": tar_of({})})
    assert "no image of any class" in refuse(PROGRAM, "--source", empty, "--out", tmp_path / "out")
