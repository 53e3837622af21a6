"""Bad input gets a clear error or a counted substitute: never a hang, a crash, a short batch, or a wrong picture."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crate_dist.config import load_recipe
from crate_dist.data.decode import BadImage
from crate_dist.data.index import ROW, Shard, ShardError, ShardIndex
from crate_dist.data.loader import Batch, Share, TrainLoader, eval_loader
from crate_dist.data.order import Order
from crate_dist.data.reader import ShardReader
from crate_dist.data.splits import open_splits
from crate_dist.data.transforms import EvalTransform, TrainTransform
from crate_dist.prep.check import build_indexes, split_folders
from crate_dist.prep.tar import LabelRule, scan_shard
from tests.conftest import casts, write_split
from tests.data_prep import picture, refuse, run

SIZE, SAMPLES, ODD = 24, 40, 17
GOOD = picture(0, size=(200, 150))


def train_batch(index: ShardIndex, workers: int = 0) -> Batch:
    """The first micro-batch of 40 of an epoch of 40 samples."""
    order = Order(index.shard_sizes, seed=3, lanes=4, window=16)
    share = Share(0, 1, SAMPLES, SAMPLES)
    return next(TrainLoader(index, order, share, TrainTransform(SIZE), workers))


def eval_batches(index: ShardIndex, workers: int = 0) -> list[Batch]:
    return list(eval_loader(index, 0, 1, EvalTransform(SIZE, SIZE), 8, workers))


def split_with(folder: Path, odd: bytes) -> ShardIndex:
    """40 samples in three shards, of which number 17 has the given bytes."""

    def samples() -> Iterator[tuple[str, bytes, int]]:
        for number, (key, image, label) in enumerate(casts(SAMPLES, seed=5)):
            yield key, (odd if number == ODD else image), label

    return write_split(folder, samples(), shard_samples=15, classes=4)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that promises so many pixels, and has few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def jpeg_of_size(width: int, height: int) -> bytes:
    """A JPEG that promises so many pixels, and has few bytes."""
    at = GOOD.index(b"\xff\xc0") + 5
    return GOOD[:at] + struct.pack(">HH", height, width) + GOOD[at + 4 :]


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        (GOOD[: len(GOOD) * 2 // 3], "decode"),
        (b"", "image"),
        (b"once upon a time" * 50, "image"),
        (b"\xff\xd8" + bytes(500), "image"),
        (png_of_size(20_000, 20_000), "refused as a decompression bomb"),
        (jpeg_of_size(20_000, 20_000), "refused as a decompression bomb"),
    ],
    ids=["truncated", "empty", "text", "headless", "png-bomb", "jpeg-bomb"],
)
def test_what_is_no_image_is_replaced_counted_and_named(tmp_path: Path, odd: bytes, said: str) -> None:
    index = split_with(tmp_path / "train", odd)
    trained, evaluated = train_batch(index), eval_batches(index)
    for bad in (trained.bad, [item for batch in evaluated for item in batch.bad]):
        assert [(item.shard, item.key) for item in bad] == [("train-000001.tar", "000017.png")]
        assert said in bad[0].reason
        assert "verify.py" not in bad[0].reason  # shard and index do agree
    assert trained.images.shape == (SAMPLES, SIZE, SIZE, 3)
    assert [len(batch.images) for batch in evaluated] == [8] * 5
    labels = torch.cat([batch.labels for batch in evaluated])
    assert labels[ODD] == labels[ODD + 1] == index.rows["label"][ODD + 1]


def encoded(image: Image.Image, format: str) -> bytes:
    out = io.BytesIO()
    image.save(out, format)
    return out.getvalue()


RAMP = np.broadcast_to(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (48, 64, 3))


@pytest.mark.parametrize(
    ("odd", "like"),
    [
        (encoded(Image.fromarray(RAMP).convert("CMYK"), "JPEG"), RAMP),
        (encoded(Image.fromarray(RAMP[:, :, 0].astype(np.uint16) * 257), "PNG"), RAMP),
        (encoded(Image.fromarray(RAMP).convert("L"), "JPEG"), RAMP),
        (encoded(Image.fromarray(RAMP).convert("RGBA"), "PNG"), RAMP),
        (encoded(Image.fromarray(RAMP).convert("P"), "GIF"), RAMP),
        (encoded(Image.fromarray(np.full((1, 1, 3), 77, dtype=np.uint8)), "JPEG"), np.full((9, 9, 3), 77, np.uint8)),
        (encoded(Image.fromarray(np.full((1, 1, 3), 77, dtype=np.uint8)), "PNG"), np.full((9, 9, 3), 77, np.uint8)),
    ],
    ids=["cmyk", "16-bit", "grey", "rgba", "gif", "1x1-jpeg", "1x1-png"],
)
def test_what_is_an_odd_image_is_that_image(tmp_path: Path, odd: bytes, like: np.ndarray) -> None:
    index, plain = split_with(tmp_path / "a", odd), split_with(tmp_path / "b", encoded(Image.fromarray(like), "PNG"))
    for make in (lambda split: [train_batch(split)], eval_batches):
        got, expected = make(index), make(plain)
        assert not any(batch.bad for batch in got)
        difference = torch.cat([b.images for b in got]).float() - torch.cat([b.images for b in expected]).float()
        assert difference.abs().amax(dim=(1, 2, 3)).max() <= 16


def edited(index: ShardIndex, change: Callable[[np.ndarray], None]) -> ShardIndex:
    """The split with other rows on disk."""
    rows = np.array(index.rows)
    change(rows)
    np.save(index.root / "index.npy", rows)
    return ShardIndex.load(index.root)


def moved(by: int, samples: slice) -> Callable[[np.ndarray], None]:
    def change(rows: np.ndarray) -> None:
        rows["offset"][samples] += by

    return change


@pytest.mark.parametrize("workers", [0, 2])
def test_an_index_of_other_shards_is_an_error_with_the_remedy(tmp_path: Path, workers: int) -> None:
    index = edited(split_with(tmp_path / "train", GOOD), moved(by=-512, samples=slice(0, SAMPLES)))
    with pytest.raises(ShardError, match=r"16 samples in a row do not decode.*data_prep/verify\.py .*/train"):
        train_batch(index, workers)


@pytest.mark.parametrize("by", [-512, -3, 7, 512])
def test_one_row_that_points_elsewhere_is_named_with_the_remedy(tmp_path: Path, by: int) -> None:
    index = edited(split_with(tmp_path / "train", GOOD), moved(by, slice(ODD, ODD + 1)))
    for bad in (train_batch(index).bad, [item for batch in eval_batches(index) for item in batch.bad]):
        assert [item.key for item in bad] == [f"sample {ODD} at byte {index.rows['offset'][ODD]}"]
        assert "no tar header of a file of" in bad[0].reason
        assert f"data_prep/verify.py {index.root}" in bad[0].reason


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("label", 4),
        ("label", -1),
        ("offset", 0),
        ("offset", -512),
        ("offset", 2**40),
        ("size", -1),
        ("size", 2**31 - 1),
    ],
)
def test_a_row_that_cannot_be_right_is_an_error_before_the_first_step_and_when_it_is_read(
    tmp_path: Path, small_recipe: Path, column: str, value: int
) -> None:
    def change(rows: np.ndarray) -> None:
        rows[column][ODD] = value

    index = edited(split_with(tmp_path / "train", GOOD), change)
    recipe = load_recipe(small_recipe, data__root=str(tmp_path), data__val_split="")
    with pytest.raises(ShardError, match=rf"row {ODD} of .*/index.npy cannot be right.*data_prep/index\.py"):
        open_splits(recipe)
    with pytest.raises(ShardError, match=r"data_prep/(index|verify)\.py"):
        ShardReader(index).read(ODD)


@pytest.mark.parametrize("name", ["../train-000000.tar", "/etc/passwd", "a/b.tar", "..", ""])
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    index = split_with(tmp_path / "train", GOOD)
    meta = json.loads((index.root / "index.json").read_text())
    meta["shards"][0]["name"] = name
    (index.root / "index.json").write_text(json.dumps(meta))
    with pytest.raises(ShardError, match=r"no name of a shard in the same folder.*data_prep/index\.py"):
        ShardIndex.load(index.root)


def test_a_shard_that_is_deleted_while_it_is_read_stays_readable_and_is_then_missed(tmp_path: Path) -> None:
    index = split_with(tmp_path / "train", GOOD)
    reader = ShardReader(index)
    first = reader.read(0)
    (index.root / "train-000000.tar").unlink()
    (index.root / "train-000001.tar").unlink()
    assert reader.read(0) == first
    with pytest.raises(ShardError, match=r"cannot read .*train-000001.tar: No such file"):
        reader.read(20)
    with pytest.raises(ShardError, match=r"cannot read .*train-00000[01].tar: No such file"):
        train_batch(index, workers=2)


def test_a_shard_that_is_replaced_under_a_running_job_is_noticed(tmp_path: Path) -> None:
    index, other = split_with(tmp_path / "train", GOOD), split_with(tmp_path / "other", GOOD * 9)
    reader = ShardReader(index)
    before = reader.read(ODD)
    (other.root / "other-000001.tar").replace(index.root / "train-000001.tar")
    assert reader.read(ODD) == before  # the reader has the old one open
    with pytest.raises(ShardError, match=r"train-000001.tar (goes on after|ends before) its index does.*verify\.py"):
        ShardReader(index).read(ODD)


def test_a_shard_that_is_cut_off_is_an_error_wherever_the_cut_is(tmp_path: Path) -> None:
    index = split_with(tmp_path / "train", GOOD)
    path = index.root / "train-000001.tar"
    for length in (path.stat().st_size - 1, 5000, 0):
        os.truncate(path, length)
        with pytest.raises(ShardError, match=r"train-000001.tar ends before its index does.*verify\.py"):
            train_batch(index)


def tar_of(path: Path, files: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def flipped(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def test_data_prep_refuses_what_cannot_be_indexed(tmp_path: Path) -> None:
    whole = [("a.jpg", GOOD), ("a.cls", b"1"), ("b.jpg", GOOD), ("b.cls", b"0")]
    cases: list[tuple[str, Callable[[Path], object], str]] = [
        ("unlabelled", lambda p: tar_of(p, whole[:1]), "sample a has no .cls file"),
        ("negative", lambda p: tar_of(p, [whole[0], ("a.cls", b"-3")]), "sample a has label -3"),
        ("cut-off", lambda p: os.truncate(tar_of(p, whole), 2000), "cut off"),
        ("flipped", lambda p: flipped(tar_of(p, whole), at=30), "damaged|not a tar"),
        ("outside", lambda p: tar_of(p, [("../../a.jpg", GOOD), ("../../a.cls", b"1")]), "leads out of the archive"),
    ]
    for name, make, _ in cases:
        make(tmp_path / name / "x.tar")
    for name, _, said in cases:
        with pytest.raises(ShardError, match=f"{name}/x.tar: .*({said})"):
            build_indexes(split_folders(tmp_path / name), LabelRule(), None, workers=1)
        assert not (tmp_path / name / "index.json").exists()
    assert "cut-off/x.tar: cut off" in refuse("index.py", tmp_path / "cut-off")


def test_a_flipped_byte_in_a_header_is_found_by_verify_and_does_no_harm_to_training(tmp_path: Path) -> None:
    index = split_with(tmp_path / "train", GOOD)
    before = train_batch(index)
    flipped(index.root / "train-000001.tar", at=int(index.rows["offset"][ODD]) - 512 + 130)
    after = train_batch(index)
    assert torch.equal(before.images, after.images)
    assert not after.bad
    found = run("verify.py", tmp_path / "train", "--workers", 1)
    assert found.returncode == 1
    assert "DAMAGED" in found.stdout


def test_errors_of_a_worker_come_without_its_traceback(tmp_path: Path) -> None:
    index = split_with(tmp_path / "train", GOOD)
    (index.root / "train-000001.tar").unlink()
    with pytest.raises(ShardError) as caught:
        train_batch(index, workers=1)
    assert "Traceback" not in str(caught.value)


# Fuzzing. The seeds are fixed, so that what is found once is found again.


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Some of the bytes changed, and the length perhaps."""
    out = bytearray(data)
    kind = rng.randrange(7)
    at, length = rng.randrange(len(out)), rng.choice((1, 2, 4, 16, 100, 512))
    if kind == 0:
        out[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        out[at : at + length] = rng.randbytes(len(out[at : at + length]))
    elif kind == 2:
        out[at : at + length] = bytes(len(out[at : at + length])) if rng.random() < 0.5 else b"\xff" * length
    elif kind == 3:
        del out[at:]
    elif kind == 4:
        del out[at : at + length]
    elif kind == 5:
        out[at:at] = out[rng.randrange(len(out)) :][:length]
    else:
        for _ in range(rng.randrange(2, 30)):
            out[rng.randrange(min(len(out), 700))] = rng.randrange(256)  # where the headers are
    return bytes(out)


def small_tar(path: Path) -> bytes:
    files = [file for n in range(4) for file in ((f"d/{n}.jpg", picture(n, (8, 8))), (f"d/{n}.cls", b"%d" % n))]
    with tarfile.open(tar_of(path, files), "a", format=tarfile.PAX_FORMAT) as tar:
        for name in ("é" * 60 + ".jpg", "é" * 60 + ".cls"):  # with pax headers
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"1"))
    gnu = tar_of(path.with_suffix(".gnu"), [])
    with tarfile.open(gnu, "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("g" * 150 + ".jpg", "g" * 150 + ".cls"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"2"))
    return (
        path.read_bytes().rstrip(b"\0")
        + bytes(511 - (len(path.read_bytes().rstrip(b"\0")) - 1) % 512)
        + gnu.read_bytes()
    )


@pytest.mark.timeout(30)
@pytest.mark.parametrize("size", [-1, -512, -1024, 2**62])
@pytest.mark.parametrize("kind", [b"0", b"5", b"x", b"g", b"L", b"S"])
def test_sizes_that_cannot_be_are_refused_and_not_followed(tmp_path: Path, size: int, kind: bytes) -> None:
    path = tar_of(tmp_path / "x.tar", [("a.jpg", GOOD), ("a.cls", b"1"), ("README", b"x")])
    data = bytearray(path.read_bytes())
    at = data.index(b"README")
    data[at + 124 : at + 136] = b"\xff" + (size % 2**88).to_bytes(11) if size < 0 else b"\x80" + size.to_bytes(11)
    data[at + 156 : at + 157] = kind
    path.write_bytes(with_sound_checksums(bytes(data)))
    if kind == b"5" and size > 0:
        return  # a folder's size means nothing
    with pytest.raises(ShardError, match=r"x\.tar"):
        scan_shard(path)


@pytest.mark.timeout(120)
def test_a_thousand_damaged_tars_scan_or_are_refused(tmp_path: Path) -> None:
    whole = small_tar(tmp_path / "whole.tar")
    (tmp_path / "x.tar").write_bytes(whole)
    assert scan_shard(tmp_path / "x.tar").shard.samples == 6
    rng, refused = random.Random(1), 0
    for _ in range(1500):
        data = mutated(whole, rng)
        if rng.random() < 0.5:
            data = with_sound_checksums(data)
        (tmp_path / "x.tar").write_bytes(data)
        try:
            scan = scan_shard(tmp_path / "x.tar")
        except ShardError as error:
            refused += "x.tar" in str(error)
            continue
        assert all(row["offset"] >= 512 and row["offset"] + row["size"] <= len(data) for row in scan.rows)
    assert refused > 500


def with_sound_checksums(data: bytes) -> bytes:
    """So that a damaged header is not found out by its checksum: what its fields then say is believed."""
    out = bytearray(data)
    for at in range(0, len(out) - 511, 512):
        if out[at + 257 : at + 262] == b"ustar":
            out[at + 148 : at + 156] = b" " * 8
            out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
    return bytes(out)


@pytest.mark.timeout(120)
def test_a_thousand_damaged_images_never_make_a_short_batch(tmp_path: Path) -> None:
    rng = random.Random(2)
    sources = [picture(n, (24, 18)) for n in range(20)] + [picture(n, (16, 16), format="PNG") for n in range(10)]

    def samples() -> Iterator[tuple[str, bytes, int]]:
        for number in range(1600):  # one in three is sound, so that no 16 in a row are not
            data = rng.choice(sources)
            yield f"{number:06d}", (data if number % 3 == 0 else mutated(data, rng)), number % 4

    index = write_split(tmp_path / "train", samples(), shard_samples=100, classes=4)
    alone, together = eval_batches(index), eval_batches(index, workers=2)
    assert [len(batch.images) for batch in alone] == [8] * 200
    assert [batch.bad for batch in alone] == [batch.bad for batch in together]
    assert torch.equal(torch.cat([b.images for b in alone]), torch.cat([b.images for b in together]))
    bad = [item for batch in alone for item in batch.bad]
    assert len(bad) > 200
    assert all(item.key.endswith(".png") and item.reason for item in bad)
    order, share = Order(index.shard_sizes, seed=3, lanes=4, window=64), Share(0, 1, 80, 40)
    batches = TrainLoader(index, order, share, TrainTransform(SIZE), workers=2)
    assert all(len(next(batches).images) == 40 for _ in range(1600 // 40))


@pytest.mark.timeout(120)
def test_a_thousand_damaged_shards_are_read_in_full_batches_or_refused(tmp_path: Path) -> None:
    """Their size is as the index says; what lies in them, headers and images, is not."""
    rng = random.Random(3)
    whole = write_split(tmp_path / "whole", casts(8, seed=4), shard_samples=8, classes=4)
    data, shard = (whole.root / "whole-000000.tar").read_bytes(), whole.shards[0]
    (tmp_path / "train").mkdir()
    shards = []
    for number in range(1000):
        damaged = bytearray(mutated(data, rng)[: len(data)].ljust(len(data), b"\0"))
        last = whole.rows[-1]  # one sample stays as it is, so that no 16 in a row are damaged
        damaged[last["offset"] : last["offset"] + last["size"]] = data[last["offset"] : last["offset"] + last["size"]]
        shards.append(Shard(f"train-{number:06d}.tar", shard.samples, shard.bytes, shard.sha256))
        (tmp_path / "train" / shards[-1].name).write_bytes(damaged)
    rows = np.tile(whole.rows, len(shards)).astype(ROW)
    ShardIndex(tmp_path / "train", shards, rows, whole.classes, whole.class_names).save()
    batches = eval_batches(ShardIndex.load(tmp_path / "train"), workers=2)
    assert [len(batch.images) for batch in batches] == [8] * len(shards)
    bad = [item for batch in batches for item in batch.bad]
    assert len(bad) > 200
    assert any("verify.py" in item.reason for item in bad)


def test_a_damaged_index_loads_as_one_that_can_be_read_or_is_refused(tmp_path: Path) -> None:
    rng = random.Random(4)
    index = write_split(tmp_path / "train", casts(8, seed=4), shard_samples=4, classes=4)
    names = ("index.json", "index.npy")
    whole = {name: (index.root / name).read_bytes() for name in names}
    refused = 0
    for number in range(600):
        name = names[number % 2]
        (index.root / name).write_bytes(mutated(whole[name], rng))
        try:
            loaded = ShardIndex.load(index.root)
            loaded.check_rows()
            reader = ShardReader(loaded)
            for sample in range(loaded.num_samples):
                reader.describe(sample, "odd")
                reader.read(sample)
        except (ShardError, BadImage):
            refused += 1
        (index.root / name).write_bytes(whole[name])
    assert refused > 200
