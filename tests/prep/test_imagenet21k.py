"""data_prep/imagenet21k.py on small copies of the layouts that ImageNet-21K is met in."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from crate_dist.data.index import ShardError, ShardIndex
from crate_dist.prep.folders import ListOptions, Split
from crate_dist.prep.imagenet21k import imagenet21k
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


@pytest.mark.parametrize(
    ("program", "layout", "options"),
    [(PROGRAM, winter, ()), ("imagenet.py", winter, ()), ("imagenet.py", unpacked, ("--edition", "21k"))],
)
def test_every_layout_gives_the_same_shards_by_either_program(
    tmp_path: Path, expected: dict[str, str], program: str, layout: Callable[[Path], Path], options: tuple[str, ...]
) -> None:
    convert(program, layout(tmp_path / "in"), tmp_path / "out", *OPTIONS, "--val-per-class", 2, *options)
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
    (unpacked_to,) = shlex.split(said[2])
    convert(PROGRAM, Path(unpacked_to), tmp_path / "out", *OPTIONS, "--val-per-class", 2)
    assert tars_of(tmp_path / "out") == expected


def tar_with_links(links: dict[str, tuple[bytes, str]], again: str = "") -> bytes:
    """The first class, with links by name: (what tarfile calls their kind, where they lead), and one file again."""
    out = io.BytesIO(tar_of(IMAGES[WNIDS[0]]))
    with tarfile.open(fileobj=out, mode="a") as archive:
        for name, (kind, target) in links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
        if again:
            archive.addfile(tarfile.TarInfo(f"./{again}"))
    return out.getvalue()


def images_of(root: Path, skip_bad: bool = False) -> tuple[list[bytes], Split]:
    """What a converter takes for training images, and the split that it lists."""
    split = imagenet21k(root, ListOptions(skip_bad=skip_bad)).splits["train"]
    return [split.samples.read(i) for i in range(len(split.samples))], split


@pytest.mark.parametrize("packed", [True, False])
def test_a_hard_link_has_the_bytes_that_it_would_have_unpacked(tmp_path: Path, packed: bool) -> None:
    first = f"{WNIDS[0]}_1.JPEG"
    links = {"again.JPEG": (tarfile.LNKTYPE, f"./{first}"), "third.JPEG": (tarfile.LNKTYPE, "again.JPEG")}
    data = {f"{WNIDS[0]}.tar": tar_with_links(links)}
    source = write_tree(tmp_path / "in", {"fall11_whole.tar": tar_of(data)} if packed else data)
    images, split = images_of(source)
    assert (len(images), images.count(IMAGES[WNIDS[0]][first])) == (9, 3)
    folder = tmp_path / "unpacked" / WNIDS[0]
    folder.mkdir(parents=True)
    subprocess.run(["tar", "-xf", "-", "-C", folder], input=data[f"{WNIDS[0]}.tar"], check=True)
    assert images_of(folder.parent)[0] == images
    assert split.ignored == 0


@pytest.mark.parametrize(
    ("link", "said"),
    [
        ((tarfile.SYMTYPE, f"{WNIDS[0]}_1.JPEG"), f"a symbolic link to {WNIDS[0]}_1.JPEG"),
        ((tarfile.LNKTYPE, "/etc/passwd"), "a hard link to /etc/passwd, which is no file before it"),
        ((tarfile.FIFOTYPE, ""), "neither a file nor a link"),
    ],
)
def test_what_is_called_like_an_image_and_is_no_file_is_refused_or_left_out_by_name(
    tmp_path: Path, link: tuple[bytes, str], said: str
) -> None:
    data = tar_with_links({"x.JPEG": link, "readme": (tarfile.SYMTYPE, "nowhere")})
    source = write_tree(tmp_path / "in", {f"{WNIDS[0]}.tar": data})
    with pytest.raises(ShardError, match=rf"x\.JPEG is called like an image and is {said}; .* --skip-bad"):
        images_of(source)
    images, split = images_of(source, skip_bad=True)
    assert (len(images), split.unreadable, split.ignored) == (7, [f"x.JPEG: {said}"], 1)


def test_a_class_or_an_image_that_comes_twice_in_an_archive_is_refused(tmp_path: Path) -> None:
    tar = f"{WNIDS[0]}.tar"
    twice = {tar: class_tars()[tar], f"b/{tar}": class_tars()[tar]}
    with pytest.raises(ShardError, match=rf"holds {tar} twice: {tar} and b/{tar}"):
        images_of(write_tree(tmp_path / "a", {"fall11_whole.tar": tar_of(twice)}))
    image = f"{WNIDS[0]}_1.JPEG"
    with pytest.raises(ShardError, match=rf"\./{image} comes twice"):
        images_of(write_tree(tmp_path / "b", {tar: tar_with_links({}, again=image)}))


def test_a_class_whose_tar_is_a_link_is_refused(tmp_path: Path) -> None:
    linked = tar_with_links({f"{WNIDS[1]}.tar": (tarfile.SYMTYPE, "elsewhere")})
    with pytest.raises(ShardError, match=rf"{WNIDS[1]}\.tar is a symbolic link to elsewhere"):
        images_of(write_tree(tmp_path, {"fall11_whole.tar": linked}))


def test_what_stands_beside_the_tars_of_classes_and_is_not_read_is_named(tmp_path: Path) -> None:
    files = {f"{WNIDS[0]}.txt": b"notes", **class_tars()}
    source = imagenet21k(write_tree(tmp_path / "in", {"fall11_whole.tar": tar_of(files)}), ListOptions())
    assert any(note.endswith(f"no tars of classes, not read: {WNIDS[0]}.txt") for note in source.notes)
    both = write_tree(winter(tmp_path / "both"), {f"winter21_whole/{WNIDS[1]}/x.JPEG": picture(5)})
    named = f"the tar is read, and not the folder that stands beside it: {WNIDS[1]}"
    assert any(note.endswith(named) for note in imagenet21k(both, ListOptions()).notes)


def test_what_is_not_imagenet_21k_is_said_with_what_was_found(tmp_path: Path) -> None:
    pets = write_tree(tmp_path / "pets", {"cat/a.jpg": picture(1)})
    error = refuse(PROGRAM, "--source", pets, "--out", tmp_path / "out")
    assert "is not ImageNet-21K" in error
    assert "found cat/" in error
    empty = write_tree(tmp_path / "empty", {f"{WNIDS[3]}.tar": tar_of({})})
    assert "no image of any class" in refuse(PROGRAM, "--source", empty, "--out", tmp_path / "out")


def test_options_of_the_other_edition_are_refused(tmp_path: Path) -> None:
    source, given = winter(tmp_path / "in"), ("--out", tmp_path / "out")
    assert "--splits: ImageNet-21K has one split" in refuse(
        "imagenet.py", "--source", source, *given, "--splits", "val"
    )
    ilsvrc = write_tree(tmp_path / "1k", {"train/n01440764/n01440764_1.JPEG": picture(0)})
    error = refuse("imagenet.py", "--source", ilsvrc, *given, "--val-per-class", 2)
    assert "--val-per-class: is for ImageNet-21K" in error
