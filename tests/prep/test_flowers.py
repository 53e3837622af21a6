"""data_prep/flowers.py on small archives in the layout of the published ones, and on parts that do not fit."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io

from crate_dist.data.index import ShardError, ShardIndex
from crate_dist.prep.archives import Download, download_workspace
from crate_dist.prep.flowers import CLASS_NAMES, flowers
from crate_dist.prep.folders import ListOptions
from tests.data_prep import convert, fingerprint, picture, read_by_index, refuse, tar_of, tars_of, write_tree

PROGRAM = "flowers.py"
ANY = ("--any-digest", "--shard-samples", 5)
IMAGES = {f"image_{number:05d}.jpg": picture(number) for number in range(1, 21)}
LABELS = [77, 77, 1, 102, 51, 3, 3, 3, 77, 1, 102, 51, 9, 9, 9, 1, 1, 1, 102, 102]
SPLITS = {"trnid": [9, 2, 4, 6, 8, 16], "valid": [1, 3, 5, 7], "tstid": [20, 10, 11, 12, 13, 14, 15, 17, 18, 19]}


def mat(**arrays: Any) -> bytes:
    out = io.BytesIO()
    scipy.io.savemat(out, {name: np.array([values]) for name, values in arrays.items()})
    return out.getvalue()


def labels_of(values: list[int]) -> bytes:
    return mat(labels=np.array(values, dtype=np.uint8))


def splits_of(**changes: list[int]) -> bytes:
    return mat(**{key: np.array(ids, dtype=np.uint16) for key, ids in (SPLITS | changes).items()})


def archives(root: Path, **changes: bytes) -> Path:
    files = {
        "102flowers.tgz": tar_of({f"jpg/{name}": data for name, data in reversed(IMAGES.items())}, "w:gz"),
        "imagelabels.mat": labels_of(LABELS),
        "setid.mat": splits_of(),
    }
    return write_tree(root, files | changes)


def wanted(key: str) -> list[tuple[bytes, int]]:
    return sorted((IMAGES[f"image_{number:05d}.jpg"], LABELS[number - 1] - 1) for number in SPLITS[key])


def refused(source: Path, tmp_path: Path) -> str:
    with download_workspace(tmp_path / "out", dry_run=False) as work, pytest.raises(ShardError) as caught:
        flowers(Download(source, work, any_digest=True), ListOptions(), join_val=False)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def test_the_published_splits_come_byte_for_byte_with_their_labels_and_names(tmp_path: Path) -> None:
    convert(PROGRAM, archives(tmp_path / "in"), tmp_path / "out", *ANY)
    for split, key in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
        assert sorted(read_by_index(tmp_path / "out" / split)) == wanted(key)
    index = ShardIndex.load(tmp_path / "out/train")
    assert len(index.classes) == len(set(index.class_names)) == 102
    assert (index.class_names[0], index.class_names[76]) == ("pink primrose", "passion flower")
    assert index.class_names[15] == "globe-flower"
    assert all(re.fullmatch(r"[a-z']+([ -][a-z']+)*", name) for name in index.class_names)
    assert index.class_names[101] == CLASS_NAMES[-1] == "blackberry lily"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test", "train", "val"]


def test_packed_or_not_the_shards_are_the_same(tmp_path: Path) -> None:
    source = archives(tmp_path / "in")
    convert(PROGRAM, source, tmp_path / "packed", *ANY, "--workers", 2)
    unpacked = archives(tmp_path / "as torchvision has it/flowers-102")
    (unpacked / "102flowers.tgz").unlink()
    write_tree(unpacked / "jpg", IMAGES)
    before = fingerprint(unpacked)
    convert(PROGRAM, unpacked.parent, tmp_path / "unpacked", *ANY)
    assert tars_of(tmp_path / "packed") == tars_of(tmp_path / "unpacked")
    assert fingerprint(unpacked) == before


def test_validation_images_can_be_trained_on(tmp_path: Path) -> None:
    convert(PROGRAM, archives(tmp_path / "in"), tmp_path / "out", *ANY, "--join-val")
    assert sorted(read_by_index(tmp_path / "out/train")) == sorted(wanted("trnid") + wanted("valid"))
    assert sorted(read_by_index(tmp_path / "out/val")) == wanted("tstid")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "val"]


def test_each_file_is_checked_by_its_published_digest(tmp_path: Path) -> None:
    error = refuse(PROGRAM, "--source", archives(tmp_path / "in"), "--out", tmp_path / "out")
    assert "102flowers.tgz" in error
    assert "52808999861908f626f3c1f4e79d11fa" in error
    (tmp_path / "in/102flowers.tgz").unlink()
    write_tree(tmp_path / "in/jpg", IMAGES)
    error = refuse(PROGRAM, "--source", tmp_path / "in", "--out", tmp_path / "out")
    assert "imagelabels.mat" in error
    assert "e0620be6f572b9609742df49c70aed4d" in error
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing_and_says_how_much_it_would(tmp_path: Path) -> None:
    done = convert(PROGRAM, archives(tmp_path / "in"), tmp_path / "out", *ANY, "--dry-run", "--short-side", 9)
    assert "test: 10 images -> 2 shards" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"setid.mat": splits_of(tstid=[20, 21]), "imagelabels.mat": labels_of([*LABELS, 1])},
            "has no image_00021.jpg, which setid.mat names",
        ),
        ({"setid.mat": splits_of(valid=[9])}, "more than once in the splits: image_00009"),
        ({"setid.mat": mat(trnid=np.array([1.5]))}, "holds no whole numbers but float64"),
        ({"setid.mat": mat(other=[1])}, "setid.mat is not the one of Flowers 102"),
        ({"setid.mat": b"MATLAB 5.0"}, "setid.mat is not the one of Flowers 102"),
        ({"imagelabels.mat": labels_of([103] * 20)}, "class 103; the classes are 1 to 102"),
        ({"imagelabels.mat": labels_of([0] * 20)}, "class 0; the classes are 1 to 102"),
        ({"imagelabels.mat": labels_of([1] * 15)}, "names image 16, and imagelabels.mat has the classes of 15"),
        ({"102flowers.tgz": tar_of({"jpg/../../image_00001.jpg": b"x"}, "w:gz")}, "leads out of the archive"),
        ({"102flowers.tgz": tar_of(IMAGES, "w:gz")}, "has no folder jpg/"),
        (
            {"102flowers.tgz": tar_of({"jpg/image_00001.jpg": b"x", "jpg/a/image_00001.png": b"x"}, "w:gz")},
            "several images that are called image_00001",
        ),
        ({"102flowers.tgz": tar_of({"jpg/image_00001.jpg": bytes(9000)}, "w:gz")[:60]}, "is cut off"),
    ],
)
def test_parts_that_do_not_fit_are_named(tmp_path: Path, changes: dict[str, bytes], message: str) -> None:
    assert message in refused(archives(tmp_path / "in", **changes), tmp_path)


def test_a_part_that_is_missing_is_named_with_where_to_get_it(tmp_path: Path) -> None:
    source = archives(tmp_path / "in")
    (source / "setid.mat").unlink()
    error = refused(source, tmp_path)
    assert "setid.mat is missing" in error
    assert "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/setid.mat" in error
    (source / "102flowers.tgz").unlink()
    assert "looked for 102flowers.tgz and for the folder jpg/" in refused(source, tmp_path)
