"""Folders of images to shards, by the programs as a user runs them: what is written, interruptions, bad input."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from crate_dist.data.index import ShardIndex
from tests.data_prep import (
    class_tree,
    command,
    convert,
    fingerprint,
    picture,
    read_by_index,
    read_by_webdataset,
    refuse,
    shards_only,
    write_tree,
)

FOLDER = "image_folder.py"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of eight images."""
    return class_tree(tmp_path_factory.mktemp("images") / "tree")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough work for a conversion to be interrupted in."""
    return class_tree(tmp_path_factory.mktemp("large") / "tree", classes=4, images=60, size=(640, 480))


# ------------------------------------------------------------------------------------------------ what is written


def test_webdataset_and_the_index_both_read_back_what_was_in_the_folders(source: Path, tmp_path: Path) -> None:
    done = convert(FOLDER, source, tmp_path / "out", "--shard-samples", 5)
    split = tmp_path / "out/train"
    index = ShardIndex.load(split)
    assert index.classes == ["c0", "c1", "c2"]
    assert index.shard_sizes.tolist() == [5, 5, 5, 5, 4]
    images = {(source / f"c{c}/{i}.jpg").read_bytes(): c for c in range(3) for i in range(8)}
    by_webdataset = [(sample["jpg"], int(sample["cls"])) for sample in read_by_webdataset(split)]
    assert dict(by_webdataset) == images
    assert list(read_by_index(split)) == by_webdataset
    assert "24 images of 3 classes in 5 shards" in done.stdout
    assert f"--data {tmp_path / 'out'}" in done.stdout
    assert "24/24" in done.stderr
    assert "images/s" in done.stderr


def test_no_shard_holds_a_single_class(source: Path, tmp_path: Path) -> None:
    convert(FOLDER, source, tmp_path / "out", "--shard-samples", 8)
    index = ShardIndex.load(tmp_path / "out/train")
    assert all(len(np.unique(part)) == 3 for part in np.split(index.rows["label"], 3))


def test_the_bytes_do_not_depend_on_workers_and_place_but_on_the_seed(source: Path, tmp_path: Path) -> None:
    made = {}
    runs: dict[str, tuple[object, ...]] = {"one": (1,), "two": (2,), "three": (3,), "seed": (1, "--seed", 1)}
    for name, options in runs.items():
        origin = source
        if name == "two":
            origin = Path(shutil.copytree(source, tmp_path / "elsewhere"))
        convert(FOLDER, origin, tmp_path / name, "--shard-samples", 5, "--workers", *options)
        made[name] = shards_only(fingerprint(tmp_path / name))
    assert made["one"] == made["two"] == made["three"]
    assert made["one"] != made["seed"]


def test_splits_of_any_usual_name_share_their_labels(tmp_path: Path) -> None:
    root = class_tree(tmp_path / "tree/train")
    write_tree(root.parent, {"valid/c2/deeper/x.jpg": picture(7), "test/c0/y.png": picture(8, format="PNG")})
    done = convert(FOLDER, root.parent, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["test", "train", "val"]
    val = ShardIndex.load(tmp_path / "out/val")
    assert (val.rows["label"].tolist(), val.num_classes) == ([2], 3)
    assert "valid/ has no folder for 2 of the 3 classes" in done.stderr


def test_a_held_out_share_is_stratified_and_seeded(source: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        convert(FOLDER, source, tmp_path / name, "--val-fraction", 0.25, "--seed", seed)
    images = {n: sorted(image for image, _ in read_by_index(tmp_path / n / "val")) for n in "abc"}
    labels = [label for _, label in read_by_index(tmp_path / "a/val")]
    assert sorted(labels) == [0, 0, 1, 1, 2, 2]
    assert images["a"] == images["b"] != images["c"]
    assert not set(images["a"]) & {image for image, _ in read_by_index(tmp_path / "a/train")}


def test_oddities_are_handled_counted_and_noted(tmp_path: Path) -> None:
    files = {
        "c0/cmyk.jpg": picture(1, mode="CMYK"),
        "c0/png.JPEG": picture(2, format="PNG"),
        "c0/grey.jpg": picture(3, mode="L"),
        "c1/turned.jpg": picture(4, exif=8),
        "c1/.hidden.jpg": b"x",
        "c1/notes.txt": b"x",
    }
    done = convert(FOLDER, write_tree(tmp_path / "tree", files), tmp_path / "out")
    counted = {"CMYK": 1, "EXIF rotation (not applied)": 1, "PNG": 1, "greyscale": 1, "re-encoded": 2}
    made_by = ShardIndex.load(tmp_path / "out/train").made_by
    assert (made_by["counted"], made_by["files_ignored"]) == (counted, 2)
    assert "2 byte for byte, 2 re-encoded, 1 CMYK" in done.stdout
    assert "2 files passed over" in done.stdout


def test_short_side_and_quality_shrink_the_shards(large: Path, tmp_path: Path) -> None:
    convert(FOLDER, large, tmp_path / "small", "--short-side", 32, "--quality", 50)
    index = ShardIndex.load(tmp_path / "small/train")
    assert index.rows["size"].max() < (large / "c0/0.jpg").stat().st_size / 2
    assert index.made_by["counted"] == {"re-encoded": 240, "resized": 240}


def test_a_dry_run_tells_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    done = convert(FOLDER, source, tmp_path / "out", "--dry-run", "--shard-samples", 5)
    assert "24 images -> 5 shards" in done.stdout
    assert "nothing was written" in done.stdout
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ interruptions


def start_and_wait_for_a_shard(arguments: list[str], out: Path, number: int = 1) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        arguments,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
        # The tests may run in the background of a shell that has programs ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until = time.monotonic() + 60
    while len(list(out.glob("train/*.tar"))) < number:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    return process


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def slow(large: Path, out: Path) -> list[str]:
    options = ("--shard-samples", 10, "--quality", 90, "--workers", 2)
    return command(FOLDER, "--source", large, "--out", out, *options)


@pytest.fixture(scope="module")
def undisturbed(large: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    subprocess.run(slow(large, out), check=True, capture_output=True)
    return shards_only(fingerprint(out))


def test_after_kill_9_the_same_command_gives_the_same_bytes_and_keeps_finished_shards(
    large: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    out = tmp_path / "out"
    process = start_and_wait_for_a_shard(slow(large, out), out, number=4)
    workers = workers_of(process)
    process.kill()
    process.communicate()
    wait_until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers))
    assert not (out / "train/index.json").exists()
    (out / "train/.train-000009.tar.77.tmp").write_bytes(b"left by the dead")
    kept = {path: path.stat().st_ino for path in out.glob("train/*.tar")}
    done = subprocess.run(slow(large, out), capture_output=True, text=True, check=True)
    assert "kept from before" in done.stdout
    assert sum(path.stat().st_ino == inode for path, inode in kept.items()) >= 2
    assert shards_only(fingerprint(out)) == undisturbed
    assert not list(out.glob("train/.*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_cleanly_and_says_how_to_continue(large: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = start_and_wait_for_a_shard(slow(large, tmp_path / "out"), tmp_path / "out")
    os.killpg(process.pid, number)  # as a terminal and a batch system do
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "the same command continues" in err
    assert "Traceback" not in err
    assert not [path for path in (tmp_path / "out/train").iterdir() if path.name.endswith(".tmp")]


def test_a_killed_worker_ends_the_program_with_an_error(large: Path, tmp_path: Path) -> None:
    process = start_and_wait_for_a_shard(slow(large, tmp_path / "out"), tmp_path / "out")
    os.kill(workers_of(process)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "a worker process was killed" in err
    assert "Traceback" not in err
    assert not list((tmp_path / "out/train").glob(".*.tmp"))


def test_a_finished_conversion_says_so_and_touches_nothing(source: Path, tmp_path: Path) -> None:
    convert(FOLDER, source, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert "complete already" in convert(FOLDER, source, tmp_path / "out").stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_a_lost_or_damaged_shard_alone_is_written_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(FOLDER, source, out, "--shard-samples", 5)
    before = fingerprint(out)
    (out / "train/train-000001.tar").unlink()
    shard = out / "train/train-000002.tar"
    shard.write_bytes(shard.read_bytes().replace(b".jpg", b".jpx", 1))
    assert "3 shards kept" in convert(FOLDER, source, out, "--shard-samples", 5).stdout
    assert shards_only(fingerprint(out)) == shards_only(before)


def test_another_conversion_in_the_folder_is_an_error_that_names_the_option(source: Path, tmp_path: Path) -> None:
    convert(FOLDER, source, tmp_path / "out")
    before = fingerprint(tmp_path / "out")
    given = ("--source", source, "--out", tmp_path / "out")
    assert "--seed was 0 and is 3" in refuse(FOLDER, *given, "--seed", 3)
    error = refuse(FOLDER, *given, "--short-side", 9, "--shard-samples", 7)
    assert "--shard-samples was 1000 and is 7" in error
    assert "--short-side was not given and is 9" in error
    other = class_tree(tmp_path / "other", images=2)
    assert "--source had 24 images and has 6" in refuse(FOLDER, "--source", other, "--out", tmp_path / "out")
    assert fingerprint(tmp_path / "out") == before


# ------------------------------------------------------------------------------------------------ bad input


def test_a_disk_that_fills_up_is_named_and_leaves_nothing_half_written(large: Path, tmp_path: Path) -> None:
    arguments = slow(large, tmp_path / "out")
    limit = 60_000
    shard_bytes = 10 * (large / "c0/0.jpg").stat().st_size
    assert shard_bytes > limit
    done = subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit,) * 2),
    )
    assert done.returncode == 1
    assert "file size limit exceeded; make room" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in (tmp_path / "out/train").iterdir()) == ["conversion.json"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
def test_a_file_system_without_room_is_named(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,nr_inodes=10", "tmpfs", out], capture_output=True)
    if mounted.returncode:
        pytest.skip("mount is not allowed here")
    try:
        given = ("--source", source, "--out", out, "--shard-samples", 4, "--workers", 1)
        assert "no space left; make room" in refuse(FOLDER, *given)
        names = {path.name for path in (out / "train").iterdir()}
        assert names <= {"conversion.json", "shards.jsonl", *(f"train-{n:06d}.tar" for n in range(3))}
        subprocess.run(["mount", "-o", "remount,nr_inodes=100", out], check=True)
        assert "shards kept" in convert(FOLDER, source, out, "--shard-samples", 4).stdout
    finally:
        subprocess.run(["umount", out], check=True)


def make_folder(path: Path) -> None:
    path.mkdir()


def make_dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [make_folder, make_dangling, make_pipe])
def test_an_unreadable_image_is_named_or_left_out(tmp_path: Path, make: Callable[[Path], None]) -> None:
    root = class_tree(tmp_path / "tree", images=2)
    make(root / "c1/x.JPEG")
    assert f"{root}/c1/x.JPEG is called like an image" in refuse(FOLDER, "--source", root, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = convert(FOLDER, root, tmp_path / "out", "--skip-bad")
    assert "c1/x.JPEG" in done.stdout
    assert ShardIndex.load(tmp_path / "out/train").made_by["images_left_out"] == 1


def test_an_image_that_does_not_decode_is_named_or_left_out_without_moving_the_others(tmp_path: Path) -> None:
    root = class_tree(tmp_path / "tree")
    bad = root / "c1/3.jpg"
    whole = bad.read_bytes()
    convert(FOLDER, root, tmp_path / "whole", "--shard-samples", 5)
    bad.write_bytes(whole[: len(whole) // 2])
    given = ("--source", root, "--out", tmp_path / "out", "--shard-samples", 5, "--workers", 2)
    error = refuse(FOLDER, *given)
    assert str(bad) in error
    assert "--skip-bad" in error
    assert not list((tmp_path / "out/train").glob(".*"))
    done = convert(FOLDER, root, tmp_path / "out", *given[4:], "--skip-bad")
    assert "1 image left out" in done.stdout
    made_by = ShardIndex.load(tmp_path / "out/train").made_by
    assert [line.split(":")[0] for line in made_by["left_out"]] == ["c1/3.jpg"]
    before = [sample["__key__"] for sample in read_by_webdataset(tmp_path / "whole/train")]
    after = [sample["__key__"] for sample in read_by_webdataset(tmp_path / "out/train")]
    missing = [key for key in before if key not in after]
    assert len(missing) == 1
    assert [key for key in before if key not in missing] == after


def test_a_link_out_of_the_source_is_an_error_unless_wished_for(source: Path, tmp_path: Path) -> None:
    root = class_tree(tmp_path / "tree", images=1)
    (root / "c0/inside.jpg").symlink_to(root / "c1/0.jpg")
    convert(FOLDER, root, tmp_path / "inside")
    (root / "c0/outside.jpg").symlink_to(source / "c0/0.jpg")
    (root / "c9").symlink_to(source / "c0")
    error = refuse(FOLDER, "--source", root, "--out", tmp_path / "out")
    assert "--follow-links" in error
    assert "leads by a link out of" in error
    convert(FOLDER, root, tmp_path / "out", "--follow-links")
    assert ShardIndex.load(tmp_path / "out/train").num_samples == 3 + 2 + 8
    (root / "c0/loop").symlink_to(root / "c0")
    assert "a folder that it stands in" in refuse(FOLDER, "--source", root, "--out", tmp_path / "o2", "--follow-links")


def test_a_source_or_folder_that_cannot_be_meant_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_tree(out, {"thesis.tex": b"x"})
    assert "holds something else: thesis.tex" in refuse(FOLDER, "--source", source, "--out", out)
    write_tree(tmp_path, {"two/train/other.tar": b"x"})
    assert "holds something else: other.tar" in refuse(FOLDER, "--source", source, "--out", tmp_path / "two")
    assert "does not exist" in refuse(FOLDER, "--source", tmp_path / "none", "--out", tmp_path / "x")
    assert "lies in the source" in refuse(FOLDER, "--source", source, "--out", source / "shards")
    (tmp_path / "bare").mkdir()
    assert "no class folders" in refuse(FOLDER, "--source", tmp_path / "bare", "--out", tmp_path / "x")
    root = class_tree(tmp_path / "tree", images=1)
    write_tree(root, {"emptyish/readme.txt": b"x"})
    assert "emptyish: no image" in refuse(FOLDER, "--source", root, "--out", tmp_path / "x")
    assert "expected a whole number" in refuse(FOLDER, "--source", source, "--out", out, "--workers", 0, status=2)
    assert not (tmp_path / "x").exists()


def test_a_second_conversion_into_the_same_folder_is_refused_while_the_first_runs(large: Path, tmp_path: Path) -> None:
    process = start_and_wait_for_a_shard(slow(large, tmp_path / "out"), tmp_path / "out")
    process.send_signal(signal.SIGSTOP)  # nor does it end before the second has begun
    second = subprocess.run(slow(large, tmp_path / "out"), capture_output=True, text=True)
    process.kill()
    process.communicate()
    assert second.returncode == 1
    assert "another conversion is writing" in second.stderr
