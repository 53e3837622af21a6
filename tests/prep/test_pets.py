"""data_prep/pets.py on small archives in the layout of the published ones, with what lies among the images there."""

from __future__ import annotations

from pathlib import Path

import pytest

from crate_dist.data.index import ShardError, ShardIndex
from crate_dist.prep.archives import Download, download_workspace
from crate_dist.prep.folders import ListOptions
from crate_dist.prep.pets import pets
from tests.data_prep import convert, fingerprint, picture, read_by_index, refuse, tar_of, tars_of, write_tree

PROGRAM = "pets.py"
ANY = ("--any-digest", "--shard-samples", 5)
CLASSES = ["Abyssinian", "american_bulldog", "Egyptian_Mau", "yorkshire_terrier"]
NUMBERS = {"trainval.txt": (1, 100, 2), "test.txt": (3, 201)}
IMAGES = {
    f"{name}_{number}.jpg": picture(1000 * label + number)
    for label, name in enumerate(CLASSES)
    for numbers in NUMBERS.values()
    for number in numbers
}
IMAGES["Egyptian_Mau_100.jpg"] = picture(7, format="GIF")  # as some of the published ones are
JUNK = {"Abyssinian_1.mat": b"MATLAB 5.0", "._Abyssinian_1.jpg": b"\0\5\x16\7", ".DS_Store": b"x"}


def listing(name: str) -> bytes:
    lines = [f"{pet}_{n} {label + 1} {1 + label % 2} 1" for label, pet in enumerate(CLASSES) for n in NUMBERS[name]]
    return "".join(f"{line}\n" for line in lines).encode()


ANNOTATIONS = {
    "README": b"x",
    "list.txt": b"#Image CLASS-ID SPECIES BREED ID\n",
    "trainval.txt": listing("trainval.txt"),
    "test.txt": listing("test.txt"),
    "trimaps/Abyssinian_1.png": b"x",
    "trimaps/._Abyssinian_1.png": b"x",
    "xmls/Abyssinian_1.xml": b"<annotation/>",
}


def packed(folder: str, files: dict[str, bytes]) -> bytes:
    return tar_of({f"{folder}/{name}": data for name, data in files.items()}, "w:gz")


def archives(root: Path, images: dict[str, bytes] | None = None, annotations: dict[str, bytes] | None = None) -> Path:
    files = {
        "images.tar.gz": packed("images", JUNK | (images or IMAGES)),
        "annotations.tar.gz": packed("./annotations", annotations or ANNOTATIONS),
    }
    return write_tree(root, files)


def wanted(name: str) -> list[tuple[bytes, int]]:
    return sorted((IMAGES[f"{pet}_{n}.jpg"], label) for label, pet in enumerate(CLASSES) for n in NUMBERS[name])


def refused(source: Path, tmp_path: Path) -> str:
    with download_workspace(tmp_path / "out", dry_run=False) as work, pytest.raises(ShardError) as caught:
        pets(Download(source, work, any_digest=True), ListOptions(), 0.0, 0)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def test_both_lists_become_splits_and_classes_are_called_as_their_images(tmp_path: Path) -> None:
    done = convert(PROGRAM, archives(tmp_path / "in"), tmp_path / "out", *ANY)
    assert sorted(read_by_index(tmp_path / "out/val")) == wanted("test.txt")
    found = list(read_by_index(tmp_path / "out/train"))
    assert len(found) == 12
    assert len(set(found) - set(wanted("trainval.txt"))) == 1  # the GIF
    index = ShardIndex.load(tmp_path / "out/train")
    assert index.classes == CLASSES
    assert index.class_names == ["Abyssinian", "American Bulldog", "Egyptian Mau", "Yorkshire Terrier"]
    assert index.made_by["counted"] == {"GIF": 1, "re-encoded": 1}
    assert "3 files passed over" in done.stdout


def test_packed_or_not_and_at_any_number_of_workers_the_shards_are_the_same(tmp_path: Path) -> None:
    convert(PROGRAM, archives(tmp_path / "in"), tmp_path / "packed", *ANY, "--workers", 2)
    unpacked = tmp_path / "torchvision/oxford-iiit-pet"
    write_tree(unpacked / "images", JUNK | IMAGES)
    write_tree(unpacked / "annotations", ANNOTATIONS)
    before = fingerprint(unpacked)
    convert(PROGRAM, unpacked.parent, tmp_path / "unpacked", *ANY)
    assert tars_of(tmp_path / "packed") == tars_of(tmp_path / "unpacked")
    assert fingerprint(unpacked) == before


def test_held_out_images_are_val_and_the_published_test_is_test(tmp_path: Path) -> None:
    convert(PROGRAM, archives(tmp_path / "in"), tmp_path / "out", *ANY, "--val-fraction", 0.3)
    assert sorted(read_by_index(tmp_path / "out/test")) == wanted("test.txt")
    assert sorted(label for _, label in read_by_index(tmp_path / "out/val")) == [0, 1, 2, 3]


def test_both_archives_are_checked_by_their_published_digests(tmp_path: Path) -> None:
    error = refuse(PROGRAM, "--source", archives(tmp_path / "in"), "--out", tmp_path / "out")
    assert "5c4f3ee8e5d25df40f4fd59a7f44e54c" in error
    (tmp_path / "in/images.tar.gz").unlink()
    write_tree(tmp_path / "in/images", IMAGES)
    error = refuse(PROGRAM, "--source", tmp_path / "in", "--out", tmp_path / "out")
    assert "annotations.tar.gz" in error
    assert "95a8c909bbe2e81eed6a22bccdf3f68f" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("Abyssinian_999 1 1 1\n", "has no Abyssinian_999.jpg, which trainval.txt names"),
        ("../../etc/passwd_1 1 1 1\n", "line 13: expected an image and its class"),
        ("Abyssinian_1\n", "line 13: expected an image and its class"),
        ("Abyssinian_1 0 1 1\n", "line 13: expected an image and its class"),
        ("Abyssinian_7 2 1 1\n", "class 2 is Abyssinian and american_bulldog"),
        ("beagle_1 9 1 1\n", "not numbered from 1 on"),
        ("Abyssinian_3 1 1 1\n", "more than once in trainval.txt and test.txt: Abyssinian_3"),
    ],
)
def test_a_list_that_cannot_be_right_is_named(tmp_path: Path, lines: str, message: str) -> None:
    given = {**ANNOTATIONS, "trainval.txt": ANNOTATIONS["trainval.txt"] + lines.encode()}
    assert message in refused(archives(tmp_path / "in", annotations=given), tmp_path)


def test_a_part_that_is_missing_or_cut_off_is_named(tmp_path: Path) -> None:
    source = archives(tmp_path / "in", annotations={"test.txt": listing("test.txt")})
    assert "has no file trainval.txt" in refused(source, tmp_path)
    whole = (source / "images.tar.gz").read_bytes()
    (source / "images.tar.gz").write_bytes(whole[:-400])
    assert "images.tar.gz is cut off" in refused(source, tmp_path)
    (source / "images.tar.gz").unlink()
    assert "looked for images.tar.gz and for the folder images/" in refused(source, tmp_path)
