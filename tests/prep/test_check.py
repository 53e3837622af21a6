"""data_prep/index.py and verify.py on shards of this project and on those that webdataset's own writer made."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import webdataset

from crate_dist.data.index import ShardIndex
from tests.data_prep import class_tree, convert, fingerprint, picture, read_by_index, refuse, run, write_tree

FOLDER = "image_folder.py"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of eight images."""
    return class_tree(tmp_path_factory.mktemp("images") / "tree")


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Shards by webdataset's own writer: train with three shards, val with one."""
    root = tmp_path / "foreign"
    for split, number in (("train", 6), ("val", 2)):
        (root / split).mkdir(parents=True)
        with webdataset.ShardWriter(str(root / split / "s-%04d.tar"), maxcount=2, verbose=0) as writer:
            for n in range(number):
                writer.write({"__key__": f"k{n:03d}", "jpg": picture(n), "cls": n % 4, "json": {"y": n % 2}})
    return root


def test_shards_of_others_get_an_index_with_one_numbering_for_all_splits(foreign: Path, tmp_path: Path) -> None:
    assert run("index.py", foreign, "--workers", 2).returncode == 0
    train, val = ShardIndex.load(foreign / "train"), ShardIndex.load(foreign / "val")
    assert train.shard_sizes.tolist() == [2, 2, 2]
    assert list(read_by_index(foreign / "train")) == [(picture(n), n % 4) for n in range(6)]
    assert train.classes == val.classes == ["0", "1", "2", "3"]
    names = write_tree(tmp_path, {"names.txt": b"n01440764 tench, Tinca tinca\nodd\tan odd one\n"}) / "names.txt"
    assert run("index.py", foreign, "--label", "json:y", "--classes", names).returncode == 0
    index = ShardIndex.load(foreign / "val")
    assert (index.classes, index.class_names) == (["n01440764", "odd"], ["tench, Tinca tinca", "an odd one"])
    assert index.rows["label"].tolist() == [0, 1]
    assert run("verify.py", foreign, "--images").returncode == 0


def test_what_cannot_be_indexed_is_named_and_no_index_is_written(foreign: Path, tmp_path: Path) -> None:
    shard = foreign / "train/s-0001.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    assert str(shard) in refuse("index.py", foreign)
    assert not list(foreign.rglob("index.json"))
    (tmp_path / "bare").mkdir()
    assert "no shards (*.tar) in" in refuse("index.py", tmp_path / "bare")
    assert "json:KEY" in refuse("index.py", foreign, "--label", "txt", status=2)
    write_tree(foreign, {"val/index.json": b'{"mine": 1}'})
    assert "is not an index of this project" in refuse("index.py", foreign / "val")


def test_an_unfinished_conversion_is_not_indexed_as_if_it_were_whole(source: Path, tmp_path: Path) -> None:
    convert(FOLDER, source, tmp_path / "out", "--shard-samples", 5)
    (tmp_path / "out/train/index.json").unlink()
    (tmp_path / "out/train/train-000003.tar").unlink()
    assert "the first is train-000003.tar" in refuse("index.py", tmp_path / "out")


def test_an_index_built_anew_equals_the_one_of_the_conversion(source: Path, tmp_path: Path) -> None:
    convert(FOLDER, source, tmp_path / "out", "--shard-samples", 5)
    before = fingerprint(tmp_path / "out")
    assert run("index.py", tmp_path / "out").returncode == 0
    assert fingerprint(tmp_path / "out") == before


def test_an_index_is_not_built_anew_over_shards_that_changed_since(foreign: Path) -> None:
    split = foreign / "train"
    assert run("index.py", foreign).returncode == 0
    before, shards = fingerprint(foreign), sorted(split.glob("*.tar"))
    whole = shards[1].read_bytes()
    flipped = bytearray(whole)
    flipped[1600] ^= 1
    for data, said in (
        (flipped, "s-0001.tar has another sha256"),
        (whole + bytes(512), f"s-0001.tar has {len(whole) + 512:,} bytes instead of {len(whole):,}"),
    ):
        shards[1].write_bytes(data)
        assert said in refuse("index.py", foreign)
    shards[1].write_bytes(whole)
    shards[2].rename(split / "s-0009.tar")
    assert "s-0002.tar is missing; s-0009.tar is new" in refuse("index.py", split)
    (split / "s-0009.tar").rename(shards[2])
    assert fingerprint(foreign) == before
    shards[2].unlink()
    assert run("index.py", foreign, "--changed").returncode == 0
    assert ShardIndex.load(split).num_samples == 4


def test_class_names_are_neither_lost_nor_taken_from_another_split(foreign: Path, tmp_path: Path) -> None:
    for split, names in (("train", "red\ngreen\nblue\nnone"), ("val", "none\nblue\ngreen\nred")):
        (tmp_path / split).write_text(names)
        assert run("index.py", foreign / split, "--classes", tmp_path / split).returncode == 0
    before = fingerprint(foreign)
    assert "other classes: number 0 is 'red' in the one and 'none' in the other" in refuse("index.py", foreign)
    index = foreign / "train/index.json"
    index.write_bytes(index.read_bytes()[:-40])
    assert "the names of its classes are lost; give them with --classes" in refuse("index.py", foreign / "train")
    assert run("index.py", foreign / "train", "--classes", tmp_path / "train").returncode == 0
    assert fingerprint(foreign) == before


def test_verify_lists_every_damaged_shard(source: Path, tmp_path: Path) -> None:
    split = tmp_path / "out/train"
    convert(FOLDER, source, tmp_path / "out", "--shard-samples", 4)
    sound = run("verify.py", tmp_path / "out")
    assert (sound.returncode, "6 shards, 24 samples: all sound" in sound.stdout) == (0, True)
    flipped = bytearray((split / "train-000000.tar").read_bytes())
    flipped[1600] ^= 1
    (split / "train-000000.tar").write_bytes(flipped)
    os.truncate(split / "train-000002.tar", 2000)
    (split / "train-000004.tar").unlink()
    found = run("verify.py", tmp_path / "out")
    assert found.returncode == 1
    damaged = sorted(line.split(": ")[0][-16:] for line in found.stdout.splitlines() if line.startswith("DAMAGED"))
    assert damaged == ["train-000000.tar", "train-000002.tar", "train-000004.tar"]
    assert "sha256" in found.stdout
    assert "missing" in found.stdout


def test_verify_holds_the_rows_and_the_images_against_the_shards(source: Path, tmp_path: Path) -> None:
    split = tmp_path / "out/train"
    convert(FOLDER, source, tmp_path / "out")
    rows = np.load(split / "index.npy")
    changed = rows.copy()
    changed["label"][3] += 1
    np.save(split / "index.npy", changed)
    assert "index.npy" in run("verify.py", split).stdout
    np.save(split / "index.npy", rows)
    shard = split / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[rows["offset"][0] : rows["offset"][0] + 8] = b"notajpeg"
    shard.write_bytes(data)
    assert run("index.py", split, "--changed").returncode == 0
    assert run("verify.py", split).returncode == 0
    found = run("verify.py", split, "--images")
    assert found.returncode == 1
    assert "image number 0" in found.stdout


def test_a_brace_pattern_makes_a_split_of_some_shards(foreign: Path, tmp_path: Path) -> None:
    out = tmp_path / "splits" / "train"
    done = run("index.py", f"{foreign}/train/s-{{0000..0001}}.tar", "--out", out)
    assert done.returncode == 0, done.stderr
    assert ShardIndex.load(out).shard_sizes.tolist() == [2, 2]
    assert list(read_by_index(out)) == [(picture(n), n % 4) for n in range(4)]
    assert run("index.py", f"{foreign}/train/s-{{0000..0001}}.tar", "--out", out).returncode == 0
    assert run("verify.py", out).returncode == 0
    assert "s-0003.tar" in refuse("index.py", f"{foreign}/train/s-{{0000..0003}}.tar", "--out", out)
    assert "holds something else: s-0000.tar" in refuse("index.py", f"{foreign}/train/s-0002.tar", "--out", out)
