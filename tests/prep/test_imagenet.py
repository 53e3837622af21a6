"""data_prep/imagenet.py on small copies of the layouts that ILSVRC2012 is met in."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from crate_dist.data.index import ShardIndex
from tests.data_prep import convert, fingerprint, picture, read_by_webdataset, refuse, tar_of, tars_of, write_tree

PROGRAM = "imagenet.py"
WNIDS = ["n01440764", "n01443537", "n02105855", "n03788365"]
WORDS = ["tench, Tinca tinca", "goldfish, Carassius auratus", "Shetland sheepdog, Shetland", "mosquito net"]
# The devkit numbers classes in an order of its own, here backwards.
DEVKIT_NUMBER = {wnid: 4 - label for label, wnid in enumerate(WNIDS)}

TRAIN = {wnid: {f"{wnid}_{i}.JPEG": picture(10 * label + i) for i in range(5)} for label, wnid in enumerate(WNIDS)}
TRAIN["n02105855"]["n02105855_2933.JPEG"] = picture(99, format="PNG")
TRAIN["n03788365"]["n03788365_7.JPEG"] = picture(98, mode="CMYK")
VAL = {f"ILSVRC2012_val_{n:08d}.JPEG": (WNIDS[(3 * n) % 4], picture(1000 + n)) for n in range(1, 10)}


def devkit() -> bytes:
    """As ILSVRC2012_devkit_t12.tar.gz: the classes by their number, then an inner node of WordNet."""
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    fields += [("children", "O"), ("wordnet_height", "O"), ("num_train_images", "O")]
    leaves = sorted((number, wnid) for wnid, number in DEVKIT_NUMBER.items())
    rows = [(n, wnid, WORDS[WNIDS.index(wnid)], "gloss", 0, np.array([]), 0, 1300) for n, wnid in leaves]
    rows.append((1001, "n00001740", "entity", "gloss", 2, np.array([1, 2]), 19, 0))
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array(rows, dtype=fields).reshape(-1, 1)})
    truth = "".join(f"{DEVKIT_NUMBER[wnid]}\n" for _, (wnid, _) in sorted(VAL.items()))
    data = "ILSVRC2012_devkit_t12/data/"
    return tar_of(
        {data + "meta.mat": meta.getvalue(), data + "ILSVRC2012_validation_ground_truth.txt": truth.encode()}, "w:gz"
    )


def train_folders(prefix: str = "train/") -> dict[str, bytes]:
    return {f"{prefix}{wnid}/{name}": data for wnid, files in TRAIN.items() for name, data in files.items()}


def val_flat(prefix: str) -> dict[str, bytes]:
    return {prefix + name: data for name, (_, data) in VAL.items()}


def class_folders(root: Path) -> Path:
    val = {f"val/{wnid}/{name}": data for name, (wnid, data) in VAL.items()}
    names = "".join(f"{wnid} {words}\n" for wnid, words in zip(WNIDS, WORDS, strict=True))
    return write_tree(root, {**train_folders(), **val, "synset_words.txt": names.encode()})


def kaggle(root: Path) -> Path:
    lines = [f"{Path(name).stem},{wnid} 85 1 499 272 {wnid} 1 2 3 4 \n" for name, (wnid, _) in VAL.items()]
    files = {**train_folders("ILSVRC/Data/CLS-LOC/train/"), **val_flat("ILSVRC/Data/CLS-LOC/val/")}
    files["ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG"] = picture(1)
    files["LOC_val_solution.csv"] = ("ImageId,PredictionString\n" + "".join(reversed(lines))).encode()
    names = (f"{wnid} {words}\n" for wnid, words in zip(WNIDS, WORDS, strict=True))
    files["LOC_synset_mapping.txt"] = "".join(names).encode()
    return write_tree(root, files)


def archives(root: Path) -> Path:
    classes = {f"{wnid}.tar": tar_of(dict(reversed(TRAIN[wnid].items()))) for wnid in reversed(WNIDS)}
    return write_tree(
        root,
        {
            "ILSVRC2012_img_train.tar": tar_of(classes),
            "ILSVRC2012_img_val.tar": tar_of(val_flat("")),
            "ILSVRC2012_devkit_t12.tar.gz": devkit(),
        },
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The shards that class folders give."""
    root = tmp_path_factory.mktemp("expected")
    convert(PROGRAM, class_folders(root / "in"), root / "out", "--shard-samples", 6)
    return tars_of(root / "out")


def test_class_folders_become_shards_with_torchvisions_labels(tmp_path: Path) -> None:
    done = convert(PROGRAM, class_folders(tmp_path / "in"), tmp_path / "out", "--shard-samples", 6)
    train, val = ShardIndex.load(tmp_path / "out/train"), ShardIndex.load(tmp_path / "out/val")
    assert train.classes == val.classes == WNIDS
    assert train.class_names == val.class_names == WORDS
    assert (train.num_samples, val.num_samples) == (22, 9)
    assert train.made_by["counted"] == {"CMYK": 1, "PNG": 1, "re-encoded": 2}
    labels = {data: label for label, wnid in enumerate(WNIDS) for data in TRAIN[wnid].values()}
    for sample in read_by_webdataset(tmp_path / "out/train"):
        assert labels.get(sample["jpg"], int(sample["cls"])) == int(sample["cls"])
    wanted = {data: WNIDS.index(wnid) for wnid, data in VAL.values()}
    assert {sample["jpg"]: int(sample["cls"]) for sample in read_by_webdataset(tmp_path / "out/val")} == wanted
    assert done.stderr.count("4 of ImageNet's 1000 classes") == 1


@pytest.mark.parametrize("within", ["", "ILSVRC"])
def test_kaggles_layout_gives_the_same_shards(tmp_path: Path, expected: dict[str, str], within: str) -> None:
    convert(PROGRAM, kaggle(tmp_path / "in") / within, tmp_path / "out", "--shard-samples", 6)
    assert tars_of(tmp_path / "out") == expected
    assert ShardIndex.load(tmp_path / "out/val").class_names == WORDS


def test_the_original_archives_give_the_same_shards_and_are_not_unpacked(
    tmp_path: Path, expected: dict[str, str]
) -> None:
    source = archives(tmp_path / "in")
    before = fingerprint(source)
    convert(PROGRAM, source, tmp_path / "out", "--shard-samples", 6, "--workers", 2)
    assert tars_of(tmp_path / "out") == expected
    assert ShardIndex.load(tmp_path / "out/train").class_names == WORDS
    assert fingerprint(source) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_unpacked_training_images_beside_the_validation_archive_are_found(
    tmp_path: Path, expected: dict[str, str]
) -> None:
    source = archives(tmp_path / "in")
    (source / "ILSVRC2012_img_train.tar").unlink()
    convert(PROGRAM, write_tree(source, train_folders()), tmp_path / "out", "--shard-samples", 6)
    assert tars_of(tmp_path / "out") == expected


def test_bare_class_folders_are_a_training_split(tmp_path: Path) -> None:
    done = convert(PROGRAM, write_tree(tmp_path / "in", train_folders("")), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train"]
    assert "no val images" in done.stderr


def test_one_split_can_be_converted_at_a_time_with_the_same_result(tmp_path: Path, expected: dict[str, str]) -> None:
    source = class_folders(tmp_path / "in")
    for split in ("val", "train"):
        convert(PROGRAM, source, tmp_path / "out", "--shard-samples", 6, "--splits", split)
    assert tars_of(tmp_path / "out") == expected


def test_splits_of_different_classes_do_not_come_into_one_folder(tmp_path: Path) -> None:
    convert(PROGRAM, class_folders(tmp_path / "in"), tmp_path / "out", "--splits", "train")
    fewer = write_tree(tmp_path / "fewer", {f"val/{WNIDS[2]}/a.JPEG": picture(1)})
    assert "with other classes" in refuse(PROGRAM, "--source", fewer, "--out", tmp_path / "out")


def test_what_is_not_imagenet_is_said_with_what_was_found(tmp_path: Path) -> None:
    pets = write_tree(tmp_path / "pets", {"train/cat/a.jpg": picture(1), "readme.md": b"x"})
    error = refuse(PROGRAM, "--source", pets, "--out", tmp_path / "out")
    assert "is not ImageNet" in error
    assert "found readme.md, train/" in error
    assert "image_folder.py" in error


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    source = archives(tmp_path / "in")
    (source / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    error = refuse(PROGRAM, "--source", source, *out)
    assert "ILSVRC2012_devkit_t12.tar.gz" in error
    assert "--splits train" in error
    convert(PROGRAM, source, tmp_path / "train-only", "--splits", "train", "--dry-run")
    (source / "ILSVRC2012_img_val.tar").unlink()
    assert "no val images" in refuse(PROGRAM, "--source", source, *out, "--splits", "train", "val")
    (source / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"no archive")
    assert "devkit" in refuse(PROGRAM, "--source", write_tree(source, val_flat("val/")), *out)


def test_an_empty_class_and_unknown_validation_classes_are_named(tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    source = class_folders(tmp_path / "in")
    (source / "train/n09999999").mkdir()
    assert "n09999999: no image" in refuse(PROGRAM, "--source", source, *out)
    (source / "train/n09999999").rmdir()
    write_tree(source, {"val/n09999999/x.JPEG": picture(1)})
    assert "not among the 4 training classes (n09999999)" in refuse(PROGRAM, "--source", source, *out)
    tars = archives(tmp_path / "tars")
    classes = {f"{wnid}.tar": tar_of(TRAIN[wnid]) for wnid in WNIDS[:3]} | {f"{WNIDS[3]}.tar": tar_of({})}
    write_tree(tars, {"ILSVRC2012_img_train.tar": tar_of(classes)})
    assert f"no image in {WNIDS[3]}.tar" in refuse(PROGRAM, "--source", tars, *out)


def test_an_archive_that_is_cut_off_is_named(tmp_path: Path) -> None:
    source = archives(tmp_path / "in")
    path = source / "ILSVRC2012_img_train.tar"
    path.write_bytes(path.read_bytes()[:-14000])
    assert str(path) in refuse(PROGRAM, "--source", source, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
