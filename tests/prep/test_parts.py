"""Conversions in parts, by the programs as users run them on several machines with one file system."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from crate_dist.data.index import ShardError, ShardIndex
from crate_dist.prep.check import split_folders
from crate_dist.prep.folders import ListOptions, image_folder
from crate_dist.prep.images import ImageOptions
from crate_dist.prep.journal import ConversionIdentity, SplitFolder
from crate_dist.prep.parts import held, progress
from crate_dist.prep.shards import WHOLE, Part, ShardPlan
from crate_dist.run.holder import Holder
from crate_dist.run.lock import RunLock
from tests.data_prep import class_tree, command, convert, fingerprint, picture, refuse, run, shards_only, write_tree

FOLDER = "image_folder.py"
OPTIONS = ("--shard-samples", 4, "--val-fraction", 0.2, "--workers", 1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of ten images, one of them twice."""
    root = class_tree(tmp_path_factory.mktemp("images") / "tree", images=10)
    return write_tree(root, {"c2/again.jpg": (root / "c0/0.jpg").read_bytes()})


@pytest.fixture(scope="module")
def one_machine(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion by one machine."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert "1 image with the same bytes" in convert(FOLDER, source, out, *OPTIONS).stdout
    return out


@pytest.fixture(scope="module")
def alone(one_machine: Path) -> dict[str, str]:
    """What one machine writes."""
    return shards_only(fingerprint(one_machine))


@pytest.fixture
def finished(one_machine: Path, tmp_path: Path) -> Path:
    """A conversion that is whole."""
    return shutil.copytree(one_machine, tmp_path / "out")


def part_of(source: Path, out: Path, part: str) -> list[str]:
    return command(FOLDER, "--source", source, "--out", out, *OPTIONS, "--part", part)


def test_parts_at_the_same_time_write_what_one_machine_writes_and_one_of_them_the_index(
    source: Path, tmp_path: Path, alone: dict[str, str]
) -> None:
    parts = [
        subprocess.Popen(
            part_of(source, tmp_path / "out", f"{number}/3"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for number in (1, 2, 3)
    ]
    said = [process.communicate(timeout=120) for process in parts]
    assert [process.returncode for process in parts] == [0, 0, 0], said
    assert sum("is the last" in out for out, _ in said) == 1
    assert shards_only(fingerprint(tmp_path / "out")) == alone
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "val"]
    assert not list(tmp_path.glob("out/*/shards-*"))
    assert "complete already" in convert(FOLDER, source, tmp_path / "out", *OPTIONS).stdout


def test_a_part_alone_says_that_the_data_set_is_not_whole_and_which_parts_are_missing(
    source: Path, tmp_path: Path, alone: dict[str, str]
) -> None:
    out = tmp_path / "out"
    said = convert(FOLDER, source, out, *OPTIONS, "--part", "2/3").stdout
    assert "not whole yet: 6 shards of train, val missing, of parts 1, 3 of 3" in said
    assert "next:" not in said
    assert not list(out.glob("*/index.json"))
    assert sorted(path.parent.name for path in out.glob("*/conversion.json")) == ["train", "val"]
    lines, whole = progress(out)
    assert (lines, whole) == (
        [
            "part 1/3: 0 of 4 shards, not begun",
            "part 2/3: 3 of 3 shards, finished",
            "part 3/3: 0 of 2 shards, not begun",
            "the index: when all parts are finished",
        ],
        False,
    )
    unfinished = run("verify.py", out)
    assert unfinished.returncode == 1
    assert f"NOT FINISHED {out / 'train'}: part 2/3: 3 of 3 shards, finished" in unfinished.stdout
    assert "the command that began to write these shards goes on when it is given again" in unfinished.stdout
    begun = tmp_path / "begun" / "train"
    begun.mkdir(parents=True)
    shutil.copy(out / "train" / "conversion.json", begun)
    assert split_folders(begun.parent) == [begun]  # of which verify.py says the same
    dead = out / ".parts/003-of-003"
    dead.mkdir()
    (dead / "00000001").write_text(Holder("x", host="n7", job="77", machine="another", began="1").to_text())
    os.utime(dead, (0, 0))
    assert re.fullmatch(
        r"part 3/3: 0 of 2 shards, no sign of life for \d+ d \d\d h, was job 77 on n7", progress(out)[0][2]
    )
    shutil.rmtree(dead)  # else others would wait for a minute
    # What is left can be divided anew, or be left to one machine.
    convert(FOLDER, source, out, *OPTIONS, "--part", "2/2")
    kept = {path: path.stat().st_ino for path in out.glob("*/*.tar")}
    assert "shards kept from before" in convert(FOLDER, source, out, *OPTIONS).stdout
    assert shards_only(fingerprint(out)) == alone
    assert {path: path.stat().st_ino for path in kept} == kept
    assert progress(out) == ([f"{out} is whole: train, val"], True)


def test_a_killed_part_goes_on_and_a_shard_that_was_damaged_meanwhile_is_written_again(
    source: Path, tmp_path: Path, alone: dict[str, str]
) -> None:
    out = tmp_path / "out"
    convert(FOLDER, source, out, *OPTIONS, "--part", "2/2")
    kept = {path: path.stat().st_ino for path in out.glob("*/*.tar")}
    with subprocess.Popen(part_of(source, out, "1/2"), stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        while not (out / ".parts/001-of-002").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    (out / "train/.train-000000.tar.77.tmp").write_bytes(b"left by the dead")
    (out / "train/.train-000001.tar.78.tmp").write_bytes(b"of another part, which may be alive")
    damaged = next(path for path in kept if path.parent.name == "train")
    data = damaged.read_bytes()
    damaged.write_bytes(data.replace(b".jpg", b".jpx", 1))
    done = convert(FOLDER, source, out, *OPTIONS, "--part", "1/2")
    assert "is the last" in done.stdout
    assert shards_only(fingerprint(out)) == alone
    assert damaged.read_bytes() == data
    assert {path for path, inode in kept.items() if path.stat().st_ino != inode} == {damaged}


def test_a_part_that_is_at_work_is_refused_to_others(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(FOLDER, source, out, *OPTIONS, "--part", "1/3")
    given = ("--source", source, "--out", out, *OPTIONS)
    with RunLock(out / ".parts/002-of-003"):
        error = refuse(FOLDER, *given, "--part", "2/3")
        assert f"part 2/3 is written by {Holder.of_this_process()}; wait for it, or end it" in error
        assert "part 2/3 is written by" in refuse(FOLDER, *given)
        assert "part 2/3 is written by" in refuse(FOLDER, *given, "--part", "1/2")
        assert f"part 2/3: 0 of 3 shards, {Holder.of_this_process()}" in progress(out)[0]
        convert(FOLDER, source, out, *OPTIONS, "--part", "3/3")
    assert "--seed was 0 and is 5" in refuse(FOLDER, *given, "--part", "2/3", "--seed", 5)
    with RunLock(out / ".parts/index"):
        said = convert(FOLDER, source, out, *OPTIONS, "--part", "2/3").stdout
        assert f"all parts are finished; the index is written by {Holder.of_this_process()}" in said
        assert "next:" not in said
    assert "is the last" in convert(FOLDER, source, out, *OPTIONS, "--part", "2/3").stdout


def test_the_command_without_a_part_is_alone_where_files_cannot_be_locked(source: Path, tmp_path: Path) -> None:
    """What it holds is the lock of part 1/1, which needs no flock."""
    with RunLock(tmp_path / ".parts/001-of-001"):
        error = refuse(FOLDER, "--source", source, "--out", tmp_path, *OPTIONS, "--part", "2/3")
        assert f"another conversion is writing to {tmp_path}, {Holder.of_this_process()}; wait for it" in error
    with held(tmp_path, WHOLE):
        for part in (WHOLE, Part(2, 3)):
            with pytest.raises(ShardError, match="another conversion is writing to"), held(tmp_path, part):
                pass
    with held(tmp_path, Part(2, 3)), pytest.raises(ShardError, match="part 2/3 is written by"), held(tmp_path, WHOLE):
        pass


def test_the_status_tells_that_nobody_writes_the_index_any_more(finished: Path) -> None:
    for name in ("train", "val"):
        (finished / name / "index.json").unlink()
    remedy = "give the command of any part again, it writes the index"
    assert progress(finished)[0][-1] == f"the index: {remedy}"
    lock, me = finished / ".parts/index", Holder.of_this_process()
    with RunLock(lock):
        assert progress(finished)[0][-1] == f"the index: {me}"
    assert progress(finished)[0][-1] == f"the index: stopped, was {me}; {remedy}"
    elsewhere = Holder("x", host="n7", job="77", machine="another", began="1").to_text()
    max(lock.glob("[0-9]*")).write_text(elsewhere)
    assert progress(finished)[0][-1] == "the index: job 77 on n7"
    os.utime(lock, (0, 0))
    lines, whole = progress(finished)
    assert re.fullmatch(rf"the index: no sign of life for \d+ d \d\d h, was job 77 on n7; {remedy}", lines[-1])
    assert not whole


def test_the_status_is_whole_when_all_splits_are_and_all_their_shards_stand(finished: Path) -> None:
    assert progress(finished) == ([f"{finished} is whole: train, val"], True)
    index, shard = finished / "val/index.json", finished / "train/train-000002.tar"
    said, data = index.read_bytes(), shard.read_bytes()
    index.unlink()
    assert not progress(finished)[1]
    index.write_bytes(said)
    remedy = "the index: shards that it names are missing or changed; give the same command again"
    for left in (data[:-1], None):
        shard.unlink()
        if left:
            shard.write_bytes(left)
        assert progress(finished) == (["part 1/1: 8 of 9 shards, not finished", remedy], False)


def test_the_status_is_that_of_the_division_that_was_last_at_work(finished: Path) -> None:
    (finished / "val/index.json").unlink()
    (finished / "train/train-000002.tar").unlink()
    for parts in (16, 3):
        with held(finished, Part(1, parts)):
            pass
    names = [line.partition(":")[0] for line in progress(finished)[0]]
    assert names == ["part 1/3", "part 2/3", "part 3/3", "the index"]
    with RunLock(finished / ".parts/003-of-016"):
        later = time.time() + 60
        os.utime(finished / ".parts/001-of-003", (later, later))
        assert f"part 3/16: 0 of 1 shard, {Holder.of_this_process()}" in progress(finished)[0]


def test_two_first_parts_of_different_conversions_do_not_mix(source: Path, tmp_path: Path) -> None:
    """The second one looked into the folder before the first one had written what it converts."""
    train = image_folder(source, ListOptions()).splits["train"]
    folders = []
    for seed in (0, 1):
        plan = ShardPlan(tmp_path / "train", train.samples, seed, 4)
        identity = ConversionIdentity.of(plan, ["a", "b", "c"], ImageOptions())
        folders.append(SplitFolder(plan, identity, Part(seed + 1, 2)))
        folders[-1].check()
    with folders[0].taken(Part(1, 2)):
        pass
    with pytest.raises(ShardError, match="--seed was 0 and is 1"), folders[1].taken(Part(2, 2)):
        pass
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == ["conversion.json"]


def test_a_part_that_cannot_be_is_said_with_what_would_do(source: Path, tmp_path: Path) -> None:
    assert (Part.parse("1/1"), Part.parse("16/16")) == (WHOLE, Part(16, 16))
    for text in ("0/3", "4/3", "3", "1/0", "a/b", "-1/2", "1/99999"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected 1/16 to 16/16"):
            Part.parse(text)
    error = refuse(FOLDER, "--source", source, "--out", tmp_path / "out", "--part", "4/3", status=2)
    assert "'4/3': expected 1/16 to 16/16, for the first to the last of 16 parts" in error


def test_a_part_with_no_shard_is_finished_at_once(tmp_path: Path) -> None:
    source, out = write_tree(tmp_path / "in", {"a/x.jpg": picture(1), "b/y.jpg": picture(2)}), tmp_path / "out"
    assert "part 2/2 is finished, 0 shards" in convert(FOLDER, source, out, "--part", "2/2").stdout
    assert "is the last" in convert(FOLDER, source, out, "--part", "1/2").stdout
    assert ShardIndex.load(out / "train").num_samples == 2
