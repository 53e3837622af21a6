"""data_prep/cifar.py on small archives in the layouts of the published ones, and on what is called so and is not."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from crate_dist.data.decode import open_image
from crate_dist.data.index import ShardError, ShardIndex
from crate_dist.prep.archives import Download, download_workspace
from crate_dist.prep.cifar import cifar
from crate_dist.prep.pickles import PickleError, load_dict
from tests.data_prep import (
    convert,
    fingerprint,
    read_by_index,
    read_by_webdataset,
    refuse,
    run,
    shards_only,
    tar_of,
    tars_of,
    write_tree,
)

PROGRAM = "cifar.py"
ANY = ("--any-digest", "--shard-samples", 12)
NAMES_10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
NAMES_100 = [f"fine_{number:03d}" for number in range(100)]
NAMES_20 = [f"coarse_{number:02d}" for number in range(20)]
PER_BATCH = 6
Bytes = NDArray[np.uint8]


def pixels_of(seed: int, images: int = PER_BATCH) -> Bytes:
    """uint8 of shape (images, 3072), as the archives hold them."""
    coarse = np.random.default_rng(seed).integers(0, 256, (images, 3, 4, 4), dtype=np.uint8)
    return coarse.repeat(8, axis=2).repeat(8, axis=3).reshape(images, 3072)


def labels_of(seed: int, classes: int, images: int = PER_BATCH) -> list[int]:
    return np.random.default_rng(seed).integers(0, classes, images).tolist()


class Python2(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, which is what the published files hold."""

    dispatch: ClassVar[dict[type, Callable[..., None]]] = dict(pickle._Pickler.dispatch)

    def save_string(self, data: bytes) -> None:
        short = len(data) < 256
        self.write(b"U" + bytes([len(data)]) + data if short else b"T" + struct.pack("<i", len(data)) + data)  # type: ignore[attr-defined]
        self.memoize(data)  # type: ignore[attr-defined]

    dispatch[bytes] = save_string


def python2(content: Any) -> bytes:
    out = io.BytesIO()
    Python2(out, protocol=2).dump(content)
    return out.getvalue().replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray")  # numpy's name of then


def python3(content: Any) -> bytes:
    return pickle.dumps(content, protocol=2)


Dump = Callable[[Any], bytes]


def cifar_10(dump: Dump) -> dict[str, bytes]:
    """The files of cifar-10-batches-py."""
    files = {
        name: dump(
            {
                b"batch_label": b"a batch",
                b"labels": labels_of(seed, 10),
                b"data": pixels_of(seed),
                b"filenames": [b"x_s_000001.png"] * PER_BATCH,
            }
        )
        for seed, name in enumerate([f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"])
    }
    files["batches.meta"] = dump(
        {b"num_cases_per_batch": PER_BATCH, b"label_names": [name.encode() for name in NAMES_10], b"num_vis": 3072}
    )
    return {"readme.html": b"<html>", **files}


def cifar_10_binary() -> dict[str, bytes]:
    """The same images as cifar-10-batches-bin."""
    names = [f"data_batch_{n}.bin" for n in range(1, 6)] + ["test_batch.bin"]
    files = {
        name: np.hstack([np.array(labels_of(seed, 10), np.uint8)[:, None], pixels_of(seed)]).tobytes()
        for seed, name in enumerate(names)
    }
    return {**files, "batches.meta.txt": "".join(f"{name}\n" for name in [*NAMES_10, ""]).encode()}


def cifar_100() -> dict[str, bytes]:
    files = {
        name: python2(
            {
                b"fine_labels": labels_of(seed, 100),
                b"coarse_labels": labels_of(seed + 9, 20),
                b"data": pixels_of(seed),
            }
        )
        for seed, name in enumerate(("train", "test"))
    }
    names = {b"fine_label_names": NAMES_100, b"coarse_label_names": NAMES_20}
    return {
        **files,
        "meta": python2({key: [name.encode() for name in given] for key, given in names.items()}),
        "file.txt~": b"",
    }


def cifar_100_binary() -> dict[str, bytes]:
    columns = [(np.array([labels_of(s + 9, 20), labels_of(s, 100)], np.uint8).T, pixels_of(s)) for s in range(2)]
    records = [np.hstack(pair).tobytes() for pair in columns]
    texts = {"fine_label_names.txt": NAMES_100, "coarse_label_names.txt": NAMES_20}
    return {
        "train.bin": records[0],
        "test.bin": records[1],
        **{name: "".join(f"{line}\n" for line in lines).encode() for name, lines in texts.items()},
    }


def packed(root: Path, archive: str, folder: str, files: dict[str, bytes]) -> Path:
    """A folder with the archive in it."""
    return write_tree(root, {archive: tar_of({f"{folder}/{name}": data for name, data in files.items()}, "w:gz")})


def python_10(root: Path, files: dict[str, bytes] | None = None) -> Path:
    return packed(root, "cifar-10-python.tar.gz", "cifar-10-batches-py", files or cifar_10(python2))


def binary_10(root: Path, files: dict[str, bytes] | None = None) -> Path:
    return packed(root, "cifar-10-binary.tar.gz", "cifar-10-batches-bin", files or cifar_10_binary())


def opened(source: Path, tmp_path: Path) -> Any:
    """The program's source of images, made in this process."""
    with download_workspace(tmp_path / "out", dry_run=False) as work:
        return cifar(Download(source, work, any_digest=True), None, False, 0.0, 0)


def refused(source: Path, tmp_path: Path) -> str:
    with pytest.raises(ShardError) as caught:
        opened(source, tmp_path)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards that the Python edition of CIFAR-10 gives."""
    root = tmp_path_factory.mktemp("expected")
    convert(PROGRAM, python_10(root / "in"), root / "out", *ANY)
    return root / "out"


def test_every_pixel_and_label_comes_through(expected: Path) -> None:
    for split, seeds in (("train", range(5)), ("val", [5])):
        wanted = [
            (pixels.tobytes(), label)
            for seed in seeds
            for pixels, label in zip(pixels_of(seed), labels_of(seed, 10), strict=True)
        ]
        index = ShardIndex.load(expected / split)
        assert index.classes == index.class_names == NAMES_10
        found = [
            (np.asarray(open_image(image)).transpose(2, 0, 1).tobytes(), label)
            for image, label in read_by_index(expected / split)
        ]
        assert sorted(found) == sorted(wanted)
        assert all(
            Image.open(io.BytesIO(sample["png"])).format == "PNG" for sample in read_by_webdataset(expected / split)
        )
    assert not (expected / ".unpacked").exists()


def test_the_editions_packed_or_not_and_any_number_of_workers_give_the_same_shards(
    tmp_path: Path, expected: Path
) -> None:
    sources = {
        "binary": binary_10(tmp_path / "a"),
        "unpacked": write_tree(tmp_path / "b/cifar-10-batches-py", cifar_10(python3)).parent,
        "unpacked binary": write_tree(tmp_path / "c/cifar-10-batches-bin", cifar_10_binary()).parent,
    }
    for name, source in sources.items():
        before = fingerprint(source)
        convert(PROGRAM, source, tmp_path / name, *ANY, "--workers", 2)
        assert tars_of(tmp_path / name) == tars_of(expected)
        assert fingerprint(source) == before


def test_the_source_may_be_the_archive_or_the_unpacked_folder_itself(tmp_path: Path, expected: Path) -> None:
    archive = python_10(tmp_path / "in") / "cifar-10-python.tar.gz"
    write_tree(archive.parent, {"cifar-100-python/meta": b""})  # beside it, and not asked for
    unpacked = write_tree(tmp_path / "b/cifar-10-batches-py", cifar_10(python3))
    for name, source in (("archive", archive), ("folder", unpacked)):
        convert(PROGRAM, source, tmp_path / name, *ANY)
        assert tars_of(tmp_path / name) == tars_of(expected)
    other = write_tree(tmp_path, {"cifar10.tar.gz": archive.read_bytes()}) / "cifar10.tar.gz"
    error = refuse(PROGRAM, "--source", other, "--out", tmp_path / "out")
    assert "no CIFAR in" in error
    assert "looked for cifar-10-python.tar.gz, " in error
    assert "it is a file of another name" in error


def test_cifar_100_comes_with_its_classes_or_its_superclasses(tmp_path: Path) -> None:
    python = packed(tmp_path / "p", "cifar-100-python.tar.gz", "cifar-100-python", cifar_100())
    binary = packed(tmp_path / "b", "cifar-100-binary.tar.gz", "cifar-100-binary", cifar_100_binary())
    for kind, names, options in (("fine", NAMES_100, ()), ("coarse", NAMES_20, ("--coarse",))):
        made = [tmp_path / f"{kind}-{edition}" for edition in ("python", "binary")]
        for source, out in zip((python, binary), made, strict=True):
            convert(PROGRAM, source, out, *ANY, *options)
        assert tars_of(made[0]) == tars_of(made[1])
        index = ShardIndex.load(made[0] / "train")
        assert index.classes == names
        labels = labels_of(0, 100) if kind == "fine" else labels_of(9, 20)
        assert sorted(index.rows["label"]) == sorted(labels)


def test_held_out_images_are_val_and_the_published_test_is_test(tmp_path: Path, expected: Path) -> None:
    convert(PROGRAM, python_10(tmp_path / "in"), tmp_path / "out", *ANY, "--val-fraction", 0.2)
    splits = {name: ShardIndex.load(tmp_path / "out" / name) for name in ("train", "val", "test")}
    assert splits["train"].num_samples + splits["val"].num_samples == 30
    test = sorted(read_by_index(tmp_path / "out/test"))
    assert test == sorted(read_by_index(expected / "val"))


def test_the_options_of_a_conversion_hold_here_too(tmp_path: Path, expected: Path) -> None:
    source = python_10(tmp_path / "in")
    done = convert(PROGRAM, source, tmp_path / "out", *ANY, "--dry-run")
    assert "train: 30 images -> 3 shards" in done.stdout
    assert not (tmp_path / "out").exists()
    convert(PROGRAM, source, tmp_path / "out", *ANY)
    (tmp_path / "out/train/train-000001.tar").unlink()
    write_tree(tmp_path / "out/.unpacked", {"left by the dead": b"x"})
    assert "2 shards kept" in convert(PROGRAM, source, tmp_path / "out", *ANY).stdout
    assert shards_only(fingerprint(tmp_path / "out")) == shards_only(fingerprint(expected))
    assert not (tmp_path / "out/.unpacked").exists()
    convert(PROGRAM, source, tmp_path / "jpeg", *ANY, "--quality", 90)
    assert all("jpg" in sample and "png" not in sample for sample in read_by_webdataset(tmp_path / "jpeg/train"))
    assert run("verify.py", tmp_path / "out", "--images", "--workers", 1).returncode == 0


def test_a_digest_that_was_not_published_is_named_with_what_would_do(tmp_path: Path) -> None:
    error = refuse(PROGRAM, "--source", python_10(tmp_path / "in"), "--out", tmp_path / "out")
    assert "cifar-10-python.tar.gz" in error
    assert "as published has c58f30108f718f92721af3b95e74349a" in error
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz" in error
    assert "--any-digest" in error
    assert not (tmp_path / "out").exists()
    unpacked = write_tree(tmp_path / "b/cifar-10-batches-py", cifar_10(python2)).parent
    error = refuse(PROGRAM, "--source", unpacked, "--out", tmp_path / "out")
    assert "batches.meta has the MD5" in error


def test_what_is_missing_and_what_is_there_twice_is_said(tmp_path: Path) -> None:
    other = write_tree(tmp_path / "other", {"notes.txt": b"x"})
    assert "looked for cifar-10-python.tar.gz, " in refused(other, tmp_path)
    both = write_tree(python_10(tmp_path / "both"), {"cifar-100-python/meta": b""})
    assert "--dataset 10 or 100" in refused(both, tmp_path)
    for name in ("data_batch_3", "batches.meta"):
        files = cifar_10(python2)
        del files[name]
        assert f"has no file {name}" in refused(python_10(tmp_path / name, files), tmp_path)
    wrong = packed(tmp_path / "wrong", "cifar-10-python.tar.gz", "cifar-10-batches-bin", cifar_10_binary())
    assert "has no folder cifar-10-batches-py/" in refused(wrong, tmp_path)


def test_an_archive_that_is_cut_off_damaged_or_no_archive_is_named(tmp_path: Path) -> None:
    source = python_10(tmp_path / "in")
    archive = source / "cifar-10-python.tar.gz"
    whole = archive.read_bytes()
    for content, message in [
        (whole[: len(whole) // 2], "is cut off"),
        (b"<html>404 not found</html>", "is no gzip archive"),
        (whole[:600] + bytes(40) + whole[640:], "or a damaged one"),
        (b"", "not a tar"),
    ]:
        archive.write_bytes(content)
        error = refused(source, tmp_path)
        assert str(archive) in error
        assert message in error


def records(name: str, change: Callable[[bytes], bytes]) -> dict[str, bytes]:
    files = cifar_10_binary()
    return {**files, name: change(files[name])}


def batch(**changes: Any) -> bytes:
    content = {"labels": labels_of(1, 10), "data": pixels_of(1)} | changes
    return python2({key.encode(): value for key, value in content.items() if value is not None})


def test_records_of_another_size_and_labels_out_of_range_are_named(tmp_path: Path) -> None:
    short = binary_10(tmp_path / "a", records("data_batch_2.bin", lambda data: data[:-5]))
    assert "data_batch_2.bin" in refused(short, tmp_path)
    assert "no whole number of records of 3,073 bytes" in refused(short, tmp_path)
    high = binary_10(tmp_path / "b", records("test_batch.bin", lambda data: b"\x0a" + data[1:]))
    assert "image of class 10; CIFAR-10 has classes 0 to 9" in refused(high, tmp_path)
    names = binary_10(tmp_path / "c", {**cifar_10_binary(), "batches.meta.txt": b"cat\ndog\n"})
    assert "has 2 names of classes, not 10" in refused(names, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (batch(labels=[0, 1, 2, 3, 4, 10]), "image of class 10"),
        (batch(labels=[0, 1, 2, 3, 4, -1]), "image of class -1"),
        (batch(labels=[0, 1]), "6 images and labels of shape (2,)"),
        (batch(labels=["cat"] * 6), "labels of shape (6,) and type <U3"),
        (batch(labels=None), "there is no labels in it, but data"),
        (batch(data=pixels_of(1)[:, :3000]), "rows of 3,072"),
        (batch(data=pixels_of(1).astype(np.float32)), "an array of something else than bytes"),
        (batch(data=[1, 2, 3]), "rows of 3,072"),
        (python2([1, 2]), "holds a list"),
        (batch()[:-100], "it is damaged"),
        (b"", "it is damaged"),
    ],
)
def test_a_pickle_that_is_no_batch_says_so(tmp_path: Path, content: bytes, message: str) -> None:
    source = python_10(tmp_path / "in", {**cifar_10(python2), "data_batch_2": content})
    error = refused(source, tmp_path)
    assert "data_batch_2 in " in error
    assert message in error


class Malicious:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_nothing_in_a_pickle_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (os.system, (f"touch {mark}",)),
        (eval, (f"open({str(mark)!r}, 'w')",)),
        (getattr, ("x", "upper")),
        (np.frombuffer, (b"x", "u1")),
        (__import__, ("os",)),
    ]
    for function, arguments in calls:
        evil = python2({b"labels": [Malicious(function, *arguments)], b"data": pixels_of(1)})
        source = python_10(tmp_path / "in", {**cifar_10(python2), "data_batch_1": evil})
        assert "has no place in it and is not opened" in refused(source, tmp_path)
    assert not mark.exists()
    with pytest.raises(PickleError, match="damaged"):  # the stand-ins do nothing with strange arguments
        load_dict(b"cnumpy\nndarray\n(I99999999999\ntR.")
    with pytest.raises(PickleError, match=r"numpy\.core\.multiarray\.scalar"):
        load_dict(b"cnumpy.core.multiarray\nscalar\n(tR.")


def archive_with(tmp_path: Path, change: Callable[[tarfile.TarInfo], None]) -> Path:
    """An archive whose data_batch_1 has another header."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, data in cifar_10(python2).items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            if name == "data_batch_1":
                change(info)
            archive.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return write_tree(tmp_path / "in", {"cifar-10-python.tar.gz": out.getvalue()})


@pytest.mark.parametrize("name", ["../data_batch_1", "/etc/data_batch_1", "cifar-10-batches-py/../../x"])
def test_a_name_that_leads_out_of_an_archive_is_refused(tmp_path: Path, name: str) -> None:
    source = archive_with(tmp_path, lambda info: setattr(info, "name", name))
    assert "leads out of the archive" in refused(source, tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["cifar-10-python.tar.gz", "in"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_a_link_or_a_device_in_an_archive_is_no_file(tmp_path: Path, kind: bytes) -> None:
    def change(info: tarfile.TarInfo) -> None:
        info.type, info.linkname, info.size = kind, "/etc/passwd", 0

    assert "has no file data_batch_1" in refused(archive_with(tmp_path, change), tmp_path)


def test_a_second_conversion_into_the_same_folder_waits_for_nobody(tmp_path: Path) -> None:
    source = python_10(tmp_path / "in")
    with download_workspace(tmp_path / "out", dry_run=False):
        assert "another conversion is writing" in refuse(PROGRAM, "--source", source, "--out", tmp_path / "out")
