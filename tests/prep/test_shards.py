"""Scanning tars, what becomes of images, the plan of shards: without programs and processes."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from crate_dist.data.decode import BadImage
from crate_dist.data.index import ShardError, ShardIndex
from crate_dist.prep import convert
from crate_dist.prep.images import ImageOptions, transcode
from crate_dist.prep.samples import ImageRef, Samples
from crate_dist.prep.shards import ShardPlan, make_shard
from crate_dist.prep.tar import LabelRule, scan_shard, walk_tar
from tests.data_prep import class_tree, picture, write_tree


def write_tar(path: Path, files: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, label: object = 1, image: bytes | None = None, extension: str = "jpg") -> list[tuple[str, bytes]]:
    return [(f"{key}.cls", str(label).encode()), (f"{key}.{extension}", image or picture(1))]


# ------------------------------------------------------------------------------------------------ scanning


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_rows_give_the_bytes_of_each_image_in_any_tar_format(tmp_path: Path, format: int) -> None:
    long = "some-folder/" + "a" * 60 if format == tarfile.USTAR_FORMAT else "d" * 90 + "/" + "é" * 90
    images = [picture(seed) for seed in range(3)]
    keys = ["a", long, "v1.2/c"]
    path = write_tar(
        tmp_path / "x.tar", [f for n, k in enumerate(keys) for f in sample(k, n, images[n], "JPEG")], format
    )
    scan = scan_shard(path)
    data = path.read_bytes()
    assert [data[r["offset"] : r["offset"] + r["size"]] for r in scan.rows] == images
    assert scan.rows["label"].tolist() == [0, 1, 2]
    assert (scan.shard.samples, scan.shard.bytes) == (3, len(data))


def test_shards_of_webdatasets_own_writer_are_scanned_with_json_labels(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "s-%03d.tar"), maxcount=2, verbose=0) as writer:
        for n in range(3):
            meta = {"meta": {"label": n}, "caption": "x"}
            writer.write({"__key__": f"k{n}", "png": picture(n, format="PNG"), "json": meta, "seg.png": b"mask"})
    labels = [
        scan_shard(p, LabelRule.parse("json:meta.label")).rows["label"].tolist() for p in sorted(tmp_path.iterdir())
    ]
    assert labels == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("a.jpg", b"x")], "sample a has no .cls file"),
        ([("a.cls", b"1"), ("a.txt", b"x")], "sample a has no image; its files: .cls, .txt"),
        (sample("a", "dog"), "sample a: the label is not an integer but 'dog'"),
        (sample("a", "1.5"), "not an integer"),
        (sample("a", -1), "sample a has label -1, expected 0 to 9"),
        (sample("a", 10), "sample a has label 10, expected 0 to 9"),
        (sample("a") + sample("b") + sample("a"), "sample a comes twice"),
        ([*sample("a"), ("a.jpg", b"x")], "sample a has two files .jpg"),
        ([*sample("a"), ("a.png", b"x")], "sample a has several images; its files: .jpg, .png"),
        (sample("../a"), "leads out of the archive"),
        (sample("/etc/a"), "leads out of the archive"),
    ],
)
def test_a_wrong_sample_is_named_with_its_shard(tmp_path: Path, files: list[tuple[str, bytes]], message: str) -> None:
    path = write_tar(tmp_path / "wrong.tar", files)
    with pytest.raises(ShardError, match=f"wrong.tar.*(?:{message})"):
        scan_shard(path, num_classes=10)


def test_a_wrong_json_label_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "j.tar", [("a.json", json.dumps({"x": 1}).encode()), ("a.jpg", b"x")])
    with pytest.raises(ShardError, match=r"sample a: no key 'label' in its .json, which has: x"):
        scan_shard(path, LabelRule("label"))
    path = write_tar(tmp_path / "j.tar", [("a.json", b'{"label": true}'), ("a.jpg", b"x")])
    with pytest.raises(ShardError, match="not an integer but True"):
        scan_shard(path, LabelRule("label"))


def test_a_shard_that_is_cut_off_anywhere_is_found_out(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "x.tar", sample("a") + sample("b")).read_bytes()
    content = len(whole.rstrip(b"\0"))
    for length in [*range(1, content, 251), 512, 1024, 1536]:
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:length])
        with pytest.raises(ShardError, match=r"cut\.tar"):
            scan_shard(path)


def test_garbage_between_members_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", sample("a") + sample("b"))
    data = bytearray(path.read_bytes())
    second = data.index(b"b.cls")
    data[second : second + 512] = b"\xaa" * 512
    path.write_bytes(data)
    with pytest.raises(ShardError, match="damaged"):
        scan_shard(path)


def test_a_compressed_shard_is_refused_with_what_would_do(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w:gz"):
        pass
    with pytest.raises(ShardError, match=r"compressed .gzip.*unpack"):
        scan_shard(tmp_path / "x.tar")


def test_a_nested_tar_is_walked_in_place_and_not_beyond_its_end(tmp_path: Path) -> None:
    inner = write_tar(tmp_path / "inner.tar", [("one.JPEG", b"first"), ("two.JPEG", b"second")]).read_bytes()
    outer = write_tar(tmp_path / "outer.tar", [("class.tar", inner), ("next", b"\1" * 4096)])
    member = next(walk_tar(outer))
    data = outer.read_bytes()
    found = list(walk_tar(outer, member.offset, member.size))
    assert [(m.name, data[m.offset : m.offset + m.size]) for m in found] == [
        ("one.JPEG", b"first"),
        ("two.JPEG", b"second"),
    ]
    with pytest.raises(ShardError, match="cut off"):
        list(walk_tar(outer, member.offset, 1024))


# ------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_plain_jpeg_passes_byte_for_byte(mode: str) -> None:
    data = picture(3, mode=mode)
    assert transcode(data, ImageOptions()) == (data, ["greyscale"] if mode == "L" else [])


@pytest.mark.parametrize(
    ("mode", "format", "counted"),
    [
        ("CMYK", "JPEG", "CMYK"),
        ("RGB", "PNG", "PNG"),
        ("P", "GIF", "GIF"),
        ("RGBA", "WEBP", "WEBP"),
        ("RGB", "BMP", "BMP"),
    ],
)
def test_everything_else_becomes_an_rgb_jpeg_of_the_same_picture(mode: str, format: str, counted: str) -> None:
    data = picture(5, mode=mode, format=format)
    out, oddities = transcode(data, ImageOptions())
    image = Image.open(io.BytesIO(out))
    assert (image.format, image.mode, oddities) == ("JPEG", "RGB", [counted, "re-encoded"])
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=int)
    assert np.abs(np.asarray(image, dtype=int) - expected).mean() < 15
    assert transcode(data, ImageOptions())[0] == out


def test_sixteen_bits_keep_their_brightness() -> None:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16)).save(out, format="PNG")
    assert abs(int(np.asarray(Image.open(io.BytesIO(transcode(out.getvalue(), ImageOptions())[0]))).mean()) - 0x80) <= 1


def test_exif_rotation_is_counted_and_not_applied() -> None:
    data = picture(1, exif=6)
    assert transcode(data, ImageOptions()) == (data, ["EXIF rotation (not applied)"])
    resized = Image.open(io.BytesIO(transcode(data, ImageOptions(short_side=9))[0]))
    assert resized.size == (12, 9)
    assert not resized.getexif()
    assert transcode(picture(1, exif=1), ImageOptions())[1] == []


def test_short_side_shrinks_and_never_enlarges() -> None:
    large = picture(1, (300, 200))
    assert Image.open(io.BytesIO(transcode(large, ImageOptions(short_side=64))[0])).size == (96, 64)
    assert transcode(large, ImageOptions(short_side=200)) == (large, [])
    assert transcode(large, ImageOptions(short_side=300)) == (large, [])
    assert "resized" in transcode(picture(1, (20, 4000)), ImageOptions(short_side=1))[1]


def test_quality_re_encodes_every_image() -> None:
    data = picture(1, (200, 200))
    low, oddities = transcode(data, ImageOptions(quality=10))
    assert len(low) < len(data)
    assert oddities == ["re-encoded"]
    assert Image.open(io.BytesIO(transcode(picture(1, mode="L"), ImageOptions(quality=50))[0])).mode == "L"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"hello", "starts with b'hello'"),
        (picture(1, (200, 200))[:-400], "truncated"),
        (picture(1)[:60], "not an image|does not decode"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "not an image"),
    ],
)
def test_what_is_no_whole_image_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(BadImage, match=message):
        transcode(data, ImageOptions())


def test_damage_in_the_middle_is_found_when_asked() -> None:
    data = bytearray(picture(1, (64, 64), format="PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(BadImage):
        transcode(bytes(data), ImageOptions())
    jpeg = bytearray(picture(1))
    table = jpeg.index(b"\xff\xc4") + 5
    jpeg[table : table + 16] = b"\xff" * 16
    assert transcode(bytes(jpeg), ImageOptions())[0] == bytes(jpeg)
    with pytest.raises(BadImage):
        transcode(bytes(jpeg), ImageOptions(verify=True))


def test_a_decompression_bomb_is_refused_without_being_decoded() -> None:
    for side in (9000, 30000):
        header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        data += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
        with pytest.raises(BadImage, match=r"(?i)decompression ?bomb"):
            transcode(data, ImageOptions())


# ------------------------------------------------------------------------------------------------ plan and shards


def plan_of(tmp_path: Path, seed: int = 0, shard_samples: int = 7) -> ShardPlan:
    root = class_tree(tmp_path / "source")
    parts = [
        Samples.collect(
            root, [ImageRef(str(p.relative_to(root)), p.stat().st_size) for p in sorted(c.iterdir())], label
        )
        for label, c in enumerate(sorted(root.iterdir()))
    ]
    (tmp_path / "train").mkdir(exist_ok=True)
    return ShardPlan(tmp_path / "train", Samples.concatenate(parts), seed, shard_samples)


def test_every_sample_goes_into_one_shard_and_the_seed_decides_where(tmp_path: Path) -> None:
    tasks = list(plan_of(tmp_path).tasks(ImageOptions(), False, {}))
    assert [(task.name, len(task.samples)) for task in tasks] == [
        ("train-000000.tar", 7), ("train-000001.tar", 7), ("train-000002.tar", 7), ("train-000003.tar", 3)
    ]  # fmt: skip
    names = [task.samples.name(i) for task in tasks for i in range(len(task.samples))]
    assert len(set(names)) == 24
    assert names != sorted(names)
    assert names != [
        t.samples.name(i) for t in plan_of(tmp_path, 1).tasks(ImageOptions(), False, {}) for i in range(len(t.samples))
    ]
    assert all(len(set(task.samples.labels)) > 1 for task in tasks)


def test_the_order_is_stable_over_versions_and_machines(tmp_path: Path) -> None:
    assert plan_of(tmp_path).order().tolist()[:6] == [6, 0, 15, 16, 19, 9]


def test_the_estimate_is_exact_up_to_the_padding(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    for task in plan.tasks(ImageOptions(), False, {}):
        make_shard(task)
    written = sum(path.stat().st_size for path in plan.folder.iterdir())
    assert written <= plan.estimated_bytes() + plan.num_shards * 1024
    assert plan.estimated_bytes() - written <= plan.num_shards * 10240


def test_any_name_becomes_a_key_that_webdataset_and_ustar_take(tmp_path: Path) -> None:
    names = ["c/ä ö.v2.jpg", "c/" + "x" * 200 + ".JPEG", "c/ä ö.v2.png", os.fsdecode(b"c/\xff.jpg")]
    root = write_tree(tmp_path / "s", {name: picture(n) for n, name in enumerate(names)})
    found = [ImageRef(name, (root / name).stat().st_size) for name in names]
    (tmp_path / "train").mkdir()
    plan = ShardPlan(tmp_path / "train", Samples.collect(root, found, 0), 0, 10)
    make_shard(next(plan.tasks(ImageOptions(), False, {})))
    with tarfile.open(tmp_path / "train/train-000000.tar") as archive:
        members = archive.getmembers()
    assert len(members) == 8
    assert all(
        m.name.isascii() and len(m.name) <= 100 and m.name.count(".") == 1 and not m.pax_headers for m in members
    )


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from crate_dist.prep.folders import ListOptions, image_folder

    root = class_tree(tmp_path / "source")
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    options = convert.Options("test", root, tmp_path / "out", 1, 0, 1000, ImageOptions(), ListOptions(), False)
    with pytest.raises(ShardError, match=r"need about .* kB and .* has 10 bytes free"):
        convert.convert(image_folder(root, ListOptions()), options)
    assert not (tmp_path / "out").exists()


def test_an_index_is_saved_and_loaded(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", sample("a", 0) + sample("b", 1))
    scan = scan_shard(path)
    ShardIndex(tmp_path, [scan.shard], scan.rows, ["x", "y"], ["x", "y"]).save()
    assert ShardIndex.load(tmp_path).rows.tolist() == scan.rows.tolist()
