"""What is trained on is what was converted: a bit that flips anywhere in an image is a bad sample, and is named."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crate_dist.config import DataSection
from crate_dist.data import reader as reading
from crate_dist.data.decode import BadImage
from crate_dist.data.index import ROW, ROW_WITHOUT_CHECKSUM, ShardError, ShardIndex, checksum
from crate_dist.data.loader import eval_loader
from crate_dist.data.reader import ShardReader
from crate_dist.data.splits import open_split
from crate_dist.data.transforms import EvalTransform
from crate_dist.prep import shards
from crate_dist.prep.check import build_indexes, verify_split
from crate_dist.prep.images import ImageOptions
from crate_dist.prep.samples import ImageRef, Samples
from crate_dist.prep.tar import LabelRule, ShardScan, scan_shard
from tests.conftest import write_split
from tests.data_prep import class_tree, picture
from tests.servers import serving

SAMPLES = 100


@pytest.fixture
def split(tmp_path: Path) -> ShardIndex:
    """A hundred JPEGs in four shards."""
    return jpegs(tmp_path / "shards/train")


def jpegs(folder: Path) -> ShardIndex:
    pictures = ((f"{n:06d}", picture(n, (64, 48)), n % 4) for n in range(SAMPLES))
    return write_split(folder, pictures, shard_samples=25, classes=4)


def without_checksums(index: ShardIndex) -> ShardIndex:
    """The same split, as indexed before there were checksums."""
    rows = np.empty(len(index.rows), ROW_WITHOUT_CHECKSUM)
    for name in ROW_WITHOUT_CHECKSUM.names or ():
        rows[name] = index.rows[name]
    ShardIndex(index.root, index.shards, rows, index.classes, index.class_names).save()
    return ShardIndex.load(index.root)


def flip(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def flip_in(index: ShardIndex, sample: int, rng: random.Random) -> tuple[Path, int, int]:
    """Flips one bit of a sample's image; says which, so that it can be flipped back."""
    row, path = index.rows[sample], index.root / index.shards[sample // 25].name
    what = path, int(row["offset"]) + rng.randrange(int(row["size"])), rng.randrange(8)
    flip(*what)
    return what


def test_a_hundred_single_bit_flips_are_all_noticed(split: ShardIndex) -> None:
    rng, reader = random.Random(0), ShardReader(split)
    for sample in range(SAMPLES):
        what = flip_in(split, sample, rng)
        with pytest.raises(BadImage, match=r"does not have the checksum in its index: .*data_prep/verify\.py"):
            reader.read(sample)
        flip(*what)
        assert checksum(reader.read(sample)) == split.rows["checksum"][sample]


def test_a_changed_sample_is_replaced_counted_and_named(split: ShardIndex) -> None:
    rng, changed = random.Random(1), [3, 40, 41, 99]
    for sample in changed:
        flip_in(split, sample, rng)
    batches = list(eval_loader(split, 0, 1, EvalTransform(24, 24), batch=25, workers=0))
    bad = [item for batch in batches for item in batch.bad]
    assert [item.key for item in bad] == ["000003.png", "000040.png", "000041.png", "000041.png", "000099.png"]
    assert all("does not have the checksum in its index" in item.reason for item in bad)
    assert [len(batch.images) for batch in batches] == [25] * 4
    assert batches[0].labels[3] == split.rows["label"][4]


def test_what_is_read_wrong_once_is_read_again(split: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = ShardReader(split)
    right, pread = reader.read(7), os.pread
    answers = iter([b"\0" + right[1:]])
    monkeypatch.setattr(reading.os, "pread", lambda *where: next(answers, None) or pread(*where))
    assert reader.read(7) == right


def test_an_index_without_checksums_works_as_before(split: ShardIndex) -> None:
    old = without_checksums(split)
    assert json.loads((old.root / "index.json").read_text())["version"] == 1
    assert not old.has_checksums
    old.check_rows()
    assert [ShardReader(old).read(n) for n in range(SAMPLES)] == [ShardReader(split).read(n) for n in range(SAMPLES)]
    assert not list(verify_split(old, decode=True, workers=1))
    rebuilt = build_indexes([old.root], LabelRule(), None, workers=1)[0]
    assert np.array_equal(ShardIndex.load(old.root).rows, split.rows)
    assert rebuilt.rows.dtype == ROW


def test_a_program_that_knows_no_checksums_refuses_their_index(split: ShardIndex) -> None:
    """It asks for version 1, as this one asks for those that it knows."""
    text = json.loads((split.root / "index.json").read_text())
    assert text["version"] == 2
    (split.root / "index.json").write_text(json.dumps({**text, "version": 3}))
    with pytest.raises(ShardError, match="has version 3, this program reads 1 and 2"):
        ShardIndex.load(split.root)
    (split.root / "index.json").write_text(json.dumps({**text, "version": 1}))
    with pytest.raises(ShardError, match=r"index.npy has 100 rows of .*checksum"):
        ShardIndex.load(split.root)


def test_verify_says_which_images_have_changed(split: ShardIndex) -> None:
    rng = random.Random(2)
    for sample in (30, 33):
        flip_in(split, sample, rng)
    assert list(verify_split(split, decode=False, workers=1)) == [
        (
            "train-000001.tar",
            "its sha256 is not the one in the index: the bytes of 2 images have changed, the first is number 5, at "
            f"byte {split.rows['offset'][30]}",
        )
    ]


def test_a_shard_that_does_not_read_back_as_it_was_written_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, rng = class_tree(tmp_path / "source", classes=1), random.Random(3)
    found = [ImageRef(str(path.relative_to(root)), path.stat().st_size) for path in sorted(root.glob("*/*"))]
    (tmp_path / "train").mkdir()
    plan = shards.ShardPlan(tmp_path / "train", Samples.collect(root, found, 0), 0, 8)

    def after_a_flip(path: Path) -> ShardScan:
        row = scan_shard(path).rows[4]
        flip(path, int(row["offset"]) + rng.randrange(int(row["size"])), 0)
        return scan_shard(path)

    monkeypatch.setattr(shards, "scan_shard", after_a_flip)
    with pytest.raises(ShardError, match="does not read back as it was written"):
        shards.make_shard(next(plan.tasks(ImageOptions(), False, {})))
    assert not list((tmp_path / "train").iterdir())


@pytest.mark.parametrize("checksums", [True, False])
def test_a_cached_shard_whose_bytes_have_changed_is_fetched_again(
    split: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checksums: bool
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    if not checksums:
        without_checksums(split)
    with serving(split.root.parent) as server:
        data = DataSection(cache_dir=tmp_path / "cache")
        index, rng = open_split(server.url, "train", data), random.Random(4)
        whole = ShardReader(index).read(7)
        for fetches in (2, 3):
            for mark in (tmp_path / "cache/shards").glob("*.sound"):
                os.utime(mark, (0, 0))  # of a start long ago
            row, cached = index.rows[7], tmp_path / f"cache/shards/{index.shards[0].sha256}.tar"
            flip(cached, int(row["offset"]) + rng.randrange(int(row["size"])), 3)
            assert ShardReader(index).read(7) == whole
            assert server.gets["train/train-000000.tar"] == fetches


def test_a_reader_that_holds_the_changed_shard_gets_the_new_one(
    split: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(split.root.parent) as server:
        reader = ShardReader(open_split(server.url, "train", DataSection(cache_dir=tmp_path / "cache")))
        whole = reader.read(7)
        flip(next((tmp_path / "cache/shards").glob("*.tar")), int(split.rows["offset"][7]), 1)
        assert reader.read(7) == whole
        assert server.gets["train/train-000000.tar"] == 2


def test_a_shard_that_was_changed_before_it_was_served_is_not_fetched_for_ever(
    split: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    rows = np.array(split.rows)
    rows["checksum"][7] ^= 1
    ShardIndex(split.root, split.shards, rows, split.classes, split.class_names).save()
    with serving(split.root.parent) as server:
        reader = ShardReader(open_split(server.url, "train", DataSection(cache_dir=tmp_path / "cache")))
        for _ in range(3):
            with pytest.raises(BadImage, match="does not have the checksum"):
                reader.read(7)
        assert server.gets["train/train-000000.tar"] == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bytes", 10**30), ("bytes", -1), ("bytes", True), ("bytes", 5e6), ("bytes", float("nan")), ("samples", 2**63),
        ("samples", None), ("name", "a/b.tar"), ("name", "a\0b"), ("name", 7), ("sha256", "x" * 64), ("sha256", 0),
    ],
)  # fmt: skip
def test_an_index_with_a_value_that_cannot_be_is_refused_by_file_and_field(
    split: ShardIndex, field: str, value: object
) -> None:
    path = split.root / "index.json"
    meta = json.loads(path.read_text())
    meta["shards"][2][field] = value
    path.write_text(json.dumps(meta))
    with pytest.raises(
        ShardError, match=rf"{path} is damaged \(shards\[2\]\.{field} is .*; `python data_prep/index.py"
    ):
        ShardIndex.load(split.root)


def test_rows_that_are_an_archive_are_refused(split: ShardIndex) -> None:
    np.savez(split.root / "rows.npz", rows=split.rows)
    (split.root / "rows.npz").replace(split.root / "index.npy")
    with pytest.raises(ShardError, match=r"is damaged \(the magic string is not correct.*; `python data_prep/index.py"):
        ShardIndex.load(split.root)


def paths_into(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where something stands in a value of JSON."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from paths_into(item, (*path, key))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([10**30, -1, 2**63, 0]) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_value_anywhere_in_an_index_gives_an_index_or_a_clear_error(
    fuzzed: tuple[ShardIndex, str], data: st.DataObject
) -> None:
    index, text = fuzzed
    meta = json.loads(text)
    *way, last = data.draw(st.sampled_from([path for path in paths_into(meta) if path]))
    place = meta
    for key in way:
        place = place[key]
    place[last] = data.draw(ANYTHING)
    (index.root / "index.json").write_text(json.dumps(meta))
    try:
        loaded = ShardIndex.load(index.root)
        loaded.check_rows()
        ShardReader(loaded).read(0)
    except ShardError as error:
        said = str(error)
    else:
        said = str(index.root)
    assert str(index.root) in said


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardIndex, str]:
    pictures = ((f"{n:06d}", picture(n), n % 2) for n in range(6))
    index = write_split(tmp_path_factory.mktemp("fuzzed") / "train", pictures, shard_samples=3, classes=2)
    return index, (index.root / "index.json").read_text()
