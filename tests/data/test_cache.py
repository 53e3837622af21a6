"""Shards that lie behind a URL: the same batches as from a folder, each shard fetched once, and no end of failures."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from crate_dist.config import DataSection, RecipeError, load_recipe
from crate_dist.data.identity import DataIdentity, Identity
from crate_dist.data.index import Remote, ShardError, ShardIndex
from crate_dist.data.loader import Batch, Share, TrainLoader, eval_loader
from crate_dist.data.order import Order
from crate_dist.data.reader import ShardReader
from crate_dist.data.remote import fetch as remote
from crate_dist.data.remote import prefetch as ahead
from crate_dist.data.remote.cache import CacheIsFull, ShardCache, locked
from crate_dist.data.remote.cache_folder import close
from crate_dist.data.remote.fetch import RetryPolicy, below, remote_file_url
from crate_dist.data.splits import open_split, open_splits
from crate_dist.data.transforms import EvalTransform, TrainTransform
from crate_dist.launching.preflight import preflight
from tests.conftest import casts, write_split
from tests.servers import FolderServer, serving

SIZE, STEPS = 24, 20
SHARDS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ (200 samples in 10 shards of about 80 kB) and val/ (40 samples in 2 shards)."""
    root = tmp_path_factory.mktemp("shards")
    write_split(root / "train", casts(200, seed=1), shard_samples=20, classes=4)
    write_split(root / "val", casts(40, seed=2), shard_samples=20, classes=4)
    return root


@pytest.fixture
def server(folder: Path) -> Iterator[FolderServer]:
    with serving(folder) as running:
        yield running


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote, "RETRIES", RetryPolicy(4, first_delay_s=0.05, longest_delay_s=0.2, silence_s=0.5))


@pytest.fixture
def data(tmp_path: Path) -> DataSection:
    return DataSection(cache_dir=tmp_path / "cache", workers=2)


def batches(index: ShardIndex, data: DataSection, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    order = Order(index.shard_sizes, seed=3, lanes=4, window=16)
    share = Share(rank, world_size, global_batch=20, micro_batch=10)
    taken = itertools.islice(
        TrainLoader(index, order, share, TrainTransform(SIZE), data.workers or 0), STEPS * 2 // world_size
    )
    return (batch._replace(images=batch.images.clone()) for batch in taken)


def images(some: Iterator[Batch]) -> torch.Tensor:
    return torch.cat([batch.images for batch in some])


def reader_of(index: ShardIndex) -> ShardReader:
    """A reader whose item n is shard n, so that the plan is the shards in their order."""
    return ShardReader(index, lambda n: np.arange(20 * n, 20 * n + 20) if n < len(index.shards) else None)


def one_shard(index: ShardIndex, cache: ShardCache, number: int) -> int:
    descriptor = cache.hold(index.shards[number])
    assert descriptor is not None
    return descriptor


def cached(data: DataSection) -> list[Path]:
    assert data.cache_dir is not None
    return sorted((data.cache_dir / "shards").glob("*"))


def wait_until(condition: object, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_that_fails_in_every_way_delivers_the_same_batches(
    folder: Path, server: FolderServer, data: DataSection
) -> None:
    faults = [["drop"], ["truncate"], ["503"], ["slow"], ["flip"], ["silent"], ["429"], ["drop", "503", "truncate"]]
    server.faults |= {f"train-{n:06d}.tar": fault for n, fault in enumerate(faults)}
    server.faults |= {"index.json": ["503", "truncate"], "index.npy": ["drop", "flip"]}
    index = open_split(server.url, "train", data)
    assert torch.equal(images(batches(index, data)), images(batches(ShardIndex.load(folder / "train"), data)))
    assert server.whole["train/train-000008.tar"] == 1
    assert all(path.suffix == ".tar" for path in cached(data))
    assert len(cached(data)) == SHARDS


@pytest.mark.spawn
def test_each_shard_is_fetched_once_by_all_ranks_and_workers_of_a_node(
    folder: Path, server: FolderServer, data: DataSection
) -> None:
    server.faults |= {f"train-{n:06d}.tar": ["slow"] for n in range(SHARDS)}
    indexes = [open_split(server.url, "train", data) for _ in range(2)]
    ranks = [batches(index, data, rank, world_size=2) for rank, index in enumerate(indexes)]
    got = list(zip(*ranks, strict=True))  # four processes that read at the same time
    expected = list(batches(ShardIndex.load(folder / "train"), data))
    for (first, second), a, b in zip(got, expected[::2], expected[1::2], strict=True):
        assert torch.equal(torch.cat([first.images, second.images]), torch.cat([a.images, b.images]))
    assert server.tars == {f"train/train-{n:06d}.tar": 1 for n in range(SHARDS)}
    assert server.gets["train/index.npy"] == 1


def test_evaluation_reads_through_the_cache(folder: Path, server: FolderServer, data: DataSection) -> None:
    both = [open_split(server.url, "val", data), ShardIndex.load(folder / "val")]
    fetched, local = (
        images(iter(eval_loader(index, 0, 1, EvalTransform(SIZE, SIZE), 8, data.workers or 0))) for index in both
    )
    assert torch.equal(fetched, local)
    assert set(server.tars.values()) == {1}


def test_a_restart_and_another_run_find_the_shards_in_the_cache(server: FolderServer, data: DataSection) -> None:
    first = images(batches(open_split(server.url, "train", data), data))
    asked = dict(server.tars)
    second = images(batches(open_split(server.url, "train", data), data))
    assert torch.equal(first, second)
    assert server.tars == asked


def test_shards_are_fetched_ahead_in_the_order_of_the_plan(server: FolderServer, data: DataSection) -> None:
    reader = reader_of(open_split(server.url, "train", data))
    reader.at(3)
    wait_until(lambda: len(cached(data)) == SHARDS - 3 and not any(p.suffix == ".part" for p in cached(data)))
    assert list(server.tars) == [f"train/train-{n:06d}.tar" for n in range(3, SHARDS)]
    reader.read(20 * 3)
    assert set(server.tars.values()) == {1}


def test_the_reader_goes_on_where_the_plan_jumps(folder: Path, server: FolderServer, data: DataSection) -> None:
    reader, local = reader_of(open_split(server.url, "train", data)), ShardReader(ShardIndex.load(folder / "train"))
    for number in (2, 7, 0, 9, 1):
        reader.at(number)
        for sample in range(20 * number, 20 * number + 20, 7):
            assert reader.read(sample) == local.read(sample)


def test_the_thread_ends_with_its_reader_and_lets_go_of_its_shards(server: FolderServer, data: DataSection) -> None:
    reader = reader_of(open_split(server.url, "train", data))
    reader.at(0)
    thread = reader._shards._thread  # type: ignore[union-attr]
    assert thread is not None
    descriptors = len(os.listdir("/proc/self/fd"))
    wait_until(lambda: len(os.listdir("/proc/self/fd")) > descriptors)
    del reader
    thread.join(timeout=10)
    assert not thread.is_alive()
    wait_until(lambda: not any(str(data.cache_dir) in target for target in open_files()))


def open_files() -> list[str]:
    targets = []
    for number in os.listdir("/proc/self/fd"):
        try:
            targets.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue
    return targets


@pytest.mark.parametrize(
    ("fault", "said", "gets"),
    [
        ("503", "HTTP status 503", 4),
        ("drop", "closed connection", 4),
        ("truncate", r"ended after [0-9,]+ of [0-9,]+ bytes", 4),
        ("silent", "timed out", 4),
        ("flip", "sha256 is not the one in the index", 4),
        ("404", "HTTP status 404", 1),
        ("403", "HTTP status 403", 1),
    ],
)
def test_a_shard_that_stays_broken_is_an_error_that_names_it(
    server: FolderServer, data: DataSection, fault: str, said: str, gets: int
) -> None:
    index = open_split(server.url, "train", data)
    server.faults["train-000004.tar"] = [fault, "forever"]
    began = time.monotonic()
    with pytest.raises(ShardError, match=rf"cannot fetch {server.url}/train/train-000004.tar: .*{said}"):
        ShardReader(index).read(81)
    assert time.monotonic() - began < 10
    assert server.gets["train/train-000004.tar"] == gets
    assert not cached(data)
    ShardReader(index).read(0)  # the others are as good as before


def test_a_loader_over_a_broken_shard_ends_with_that_error(server: FolderServer, data: DataSection) -> None:
    index = open_split(server.url, "train", data)
    server.faults["train-000004.tar"] = ["truncate", "forever"]
    with pytest.raises(ShardError, match=r"train-000004.tar: .* the last: .* ended after"):
        list(batches(index, data))


def test_the_cache_stays_within_its_bound(folder: Path, server: FolderServer, data: DataSection) -> None:
    size = max(path.stat().st_size for path in (folder / "train").glob("*.tar"))
    data = data.model_copy(update={"cache_gb": 7.5 * size / 1e9})
    most = 0

    def measure() -> None:
        nonlocal most
        assert data.cache_dir is not None
        with locked(data.cache_dir / "room.lock"):  # nothing comes or goes meanwhile
            most = max(most, sum(path.stat().st_size for path in cached(data) if path.exists()))

    server.on_get = measure
    index = open_split(server.url, "train", data)
    assert torch.equal(images(batches(index, data)), images(batches(ShardIndex.load(folder / "train"), data)))
    assert 6 * size < most <= 7.5 * size


def test_the_least_recently_used_goes_first_and_what_is_held_stays(server: FolderServer, data: DataSection) -> None:
    index = open_split(server.url, "train", data)
    assert index.remote is not None
    size = max(shard.bytes for shard in index.shards)
    cache = ShardCache(Remote(index.remote.url, index.remote.cache, int(3.5 * size)))
    held = one_shard(index, cache, 0)
    for number in (1, 2, 3):
        close(one_shard(index, cache, number))
        time.sleep(0.01)
    names = {path.stem for path in cached(data)}
    assert names == {index.shards[number].sha256 for number in (0, 2, 3)}
    more = [one_shard(index, cache, number) for number in (2, 3)]
    with pytest.raises(CacheIsFull, match=r"is too small: .* in use at this moment, and train-000004.tar needs"):
        one_shard(index, cache, 4)
    with pytest.raises(CacheIsFull):
        cache.hold(index.shards[5], ahead=True)
    assert os.pread(held, index.shards[0].bytes, 0)
    for descriptor in (held, *more):
        close(descriptor)
    close(one_shard(index, cache, 4))


def test_looking_ahead_leaves_half_of_the_cache_to_those_who_need_a_shard_now(
    server: FolderServer, data: DataSection
) -> None:
    index = open_split(server.url, "train", data)
    assert index.remote is not None
    size = max(shard.bytes for shard in index.shards)
    cache = ShardCache(Remote(index.remote.url, index.remote.cache, int(4.5 * size)))
    held = [cache.hold(index.shards[number], ahead=True) for number in range(2)]
    with pytest.raises(CacheIsFull):
        cache.hold(index.shards[2], ahead=True)
    held += [cache.hold(index.shards[number]) for number in (2, 3)]
    assert None not in held


def test_a_reader_that_stands_still_gives_way_to_one_that_needs_a_shard_now(
    folder: Path, server: FolderServer, data: DataSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "ROOM_TIMEOUT_S", 20.0)
    size = max(path.stat().st_size for path in (folder / "train").glob("*.tar"))
    index = open_split(server.url, "train", data.model_copy(update={"cache_gb": 3.5 * size / 1e9}))
    local = ShardReader(ShardIndex.load(folder / "train"))
    assert index.remote is not None
    for number in range(3):
        close(one_shard(index, ShardCache(index.remote), number))
    still, other = reader_of(index), ShardReader(index)
    still.at(0)
    assert still.read(3) == local.read(3)
    wait_until(lambda: sum(str(data.cache_dir) in target and ".tar" in target for target in open_files()) == 3)
    assert other.read(20 * 3) == local.read(20 * 3)
    assert still.read(4) == local.read(4)
    still.at(1)
    assert still.read(20) == local.read(20)


def test_a_cache_that_cannot_hold_one_shard_says_so(
    server: FolderServer, data: DataSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "ROOM_TIMEOUT_S", 0.3)
    index = open_split(server.url, "train", data.model_copy(update={"cache_gb": 1e-6}))
    with pytest.raises(ShardError, match=r"raise data.cache_gb"):
        ShardReader(index).read(0)


def test_a_full_disk_takes_from_the_cache_first_and_is_then_a_clear_error(
    server: FolderServer, data: DataSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = open_split(server.url, "train", data)
    assert index.remote is not None
    cache = ShardCache(index.remote)
    for number in range(2):
        close(one_shard(index, cache, number))
    room = os.posix_fallocate

    def full(descriptor: int, offset: int, length: int) -> None:
        if len(cached(data)) > 2:  # with the one that is being made
            raise OSError(errno.ENOSPC, "No space left on device")
        room(descriptor, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", full)
    close(one_shard(index, cache, 2))
    assert {path.stem for path in cached(data)} == {index.shards[number].sha256 for number in (1, 2)}
    held = [one_shard(index, cache, number) for number in (1, 2)]
    with pytest.raises(ShardError, match=r"cannot write the cache .*No space left on device; .* data.cache_dir"):
        one_shard(index, cache, 3)
    for descriptor in held:
        close(descriptor)


def test_a_cache_that_cannot_be_made_is_a_clear_error(server: FolderServer, data: DataSection, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(ShardError, match=r"cannot write the cache .*data.cache_dir"):
        open_split(server.url, "train", data)


FETCH_ONE = """
import sys
from pathlib import Path
from crate_dist.config import DataSection
from crate_dist.data.reader import ShardReader
from crate_dist.data.splits import open_split
ShardReader(open_split(sys.argv[1], "train", DataSection(cache_dir=Path(sys.argv[2])))).read(0)
"""


@pytest.mark.spawn
def test_a_process_that_is_killed_while_it_fetches_leaves_no_shard_and_no_lock(
    server: FolderServer, data: DataSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = open_split(server.url, "train", data)
    monkeypatch.setattr("tests.servers.SILENCE_S", 60.0)
    server.faults["train-000000.tar"] = ["silent"]
    process = subprocess.Popen([sys.executable, "-c", FETCH_ONE, server.url, str(data.cache_dir)])
    wait_until(lambda: server.gets["train/train-000000.tar"] == 1, timeout_s=60)
    wait_until(lambda: cached(data)[0].stat().st_size == index.shards[0].bytes)
    assert [path.suffix for path in cached(data)] == [".part"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.suffix for path in cached(data)] == [".part"]
    ShardReader(index).read(0)
    assert [path.suffix for path in cached(data)] == [".tar"]


def test_a_cached_shard_that_was_cut_off_is_fetched_again(server: FolderServer, data: DataSection) -> None:
    index = open_split(server.url, "train", data)
    whole = ShardReader(index).read(0)
    os.truncate(cached(data)[0], 5000)
    assert ShardReader(index).read(0) == whole
    assert server.gets["train/train-000000.tar"] == 2


def test_a_changed_index_is_noticed(tmp_path: Path, data: DataSection) -> None:
    root = tmp_path / "shards"
    with serving(root) as server:
        for seed in (1, 2):
            shutil.rmtree(root, ignore_errors=True)
            expected = write_split(root / "train", casts(40, seed), shard_samples=20, classes=4)
            index = open_split(server.url, "train", data)
            assert ShardReader(index).read(25) == ShardReader(expected).read(25)
            assert Identity.of(index) == Identity.of(expected)
        # Rows of another index than the one beside them are refused, also when they are as many.
        np.save(root / "train/index.npy", expected.rows[::-1])
        text = (root / "train/index.json").read_text()
        (root / "train/index.json").write_text(text + "\n")
        with pytest.raises(ShardError, match=r"index.npy: .*does not belong to the index.json beside it"):
            open_split(server.url, "train", data)


@pytest.mark.parametrize("name", ["index.npy", "index.json"])
@pytest.mark.parametrize("way", ["flipped", "cut", "gone"])
def test_a_cached_index_that_was_damaged_is_fetched_again(
    folder: Path, server: FolderServer, data: DataSection, name: str, way: str
) -> None:
    path = open_split(server.url, "train", data).root / name
    whole = path.read_bytes()
    if way == "gone":
        path.unlink()
    else:  # the bit is in a label, or in the name of a class
        place = len(whole) - 12 if name == "index.npy" else whole.index(b'"0"') + 1
        path.write_bytes(whole[:place] + (bytes([whole[place] ^ 1]) + whole[place + 1 :] if way == "flipped" else b""))
    index = open_split(server.url, "train", data)
    assert DataIdentity.of(index, None) == DataIdentity.of(ShardIndex.load(folder / "train"), None)
    assert path.read_bytes() == whole
    assert server.gets["train/index.npy"] == 2


def test_an_index_that_is_damaged_where_it_lies_is_fetched_twice_and_told_with_a_remedy_that_works(
    folder: Path, data: DataSection, tmp_path: Path
) -> None:
    shutil.copytree(folder / "val", tmp_path / "shards/val")
    index = ShardIndex.load(tmp_path / "shards/val")
    rows = np.array(index.rows)
    rows["label"][7] = 99
    replace(index, rows=rows).save()
    with serving(tmp_path / "shards") as server:
        with pytest.raises(ShardError, match=rf"index.py DIR`, where the shards of {server.url}/val lie, rebuilds it"):
            open_split(server.url, "val", data)
        assert server.gets["val/index.npy"] == 2


def test_a_redirect_that_is_not_followed_shows_no_more_of_its_place_than_the_scheme(
    server: FolderServer, data: DataSection
) -> None:
    for place, scheme in (("ftps://user:p4ssword@host/x?sig=s1gned", "ftps"), ("/val/index.json?sig=s1gned", "http")):
        server.faults["index.json"] = [f"302 {place}", "forever"]
        with pytest.raises(ShardError, match=rf"HTTP status 302: where it leads \({scheme}:\) is not followed") as said:
            open_split(server.url, "val", data)
        assert "s1gned" not in str(said.value)
        assert "p4ssword" not in str(said.value)


def test_the_look_before_the_launch_fetches_the_index_alone(
    server: FolderServer, data: DataSection, small_recipe: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(small_recipe, data__root=server.url, data__cache_dir=str(data.cache_dir))
    found = preflight(recipe, world_size=2, run_dir=tmp_path / "run")
    assert (found.train_images, found.val_images, found.classes) == (200, 40, 4)
    assert server.url in str(found)
    assert not server.tars
    assert "data.cache_dir" not in recipe.deciding_values()


def test_a_url_without_an_index_is_a_clear_error(
    server: FolderServer, data: DataSection, small_recipe: Path, tmp_path: Path
) -> None:
    with pytest.raises(ShardError, match=r"cannot fetch .*/nothing/index.json: HTTP status 404 .*data_prep/index.py"):
        open_split(server.url, "nothing", data)
    (tmp_path / "page").mkdir()
    (tmp_path / "page/index.json").write_text("<!DOCTYPE html><title>Log in</title>")
    with serving(tmp_path) as other, pytest.raises(ShardError, match=r"is no index: it begins with b'<!DOCTYPE"):
        open_split(other.url, "page", data)
    recipe = load_recipe(small_recipe, data__root=f"{server.url}/elsewhere", data__cache_dir=str(data.cache_dir))
    with pytest.raises(RecipeError, match="HTTP status 404"):
        preflight(recipe, world_size=2, run_dir=tmp_path / "run")
    with pytest.raises(ShardError):
        open_splits(recipe)


def test_commands_fetch_too(folder: Path, data: DataSection, tmp_path: Path) -> None:
    for root in (f"pipe:cat {folder}/{{}}", f"pipe:cat {folder}", f"pipe:cat '{folder}/{{}}' | cat"):
        section = data.model_copy(update={"cache_dir": tmp_path / str(abs(hash(root)))})
        index = open_split(root, "train", section)
        assert torch.equal(images(batches(index, section)), images(batches(ShardIndex.load(folder / "train"), section)))


@pytest.mark.parametrize(
    ("root", "said"),
    [
        ("pipe:no-such-command {}", "not there or cannot be run"),
        ("pipe:false {}", "4 attempts .* ended with exit status 1"),
        ("pipe:sleep 60; echo {}", "4 attempts .* nothing came in 0.5 s"),
        ("nosuch://bucket", "no gopen handler"),
    ],
)
def test_commands_that_fail_are_clear_errors(data: DataSection, root: str, said: str) -> None:
    began = time.monotonic()
    with pytest.raises(ShardError, match=f"cannot fetch .*{said}"):
        open_split(root, "train", data)
    assert time.monotonic() - began < 10


def test_urls_of_files_and_what_would_be_a_command_in_disguise() -> None:
    assert (
        remote_file_url(below("s3://bucket/shards/", "train"), "train-000000.tar")
        == "s3://bucket/shards/train/train-000000.tar"
    )
    assert remote_file_url(below("pipe:get {} -", "val"), "index.json") == "pipe:get val/index.json -"
    assert remote_file_url(below("https://host/{}?token=1", "val"), "a.tar") == "https://host/val/a.tar?token=1"
    for name in ("../a.tar", "a b.tar", "$(reboot).tar", "a;b", "`x`", "-rf", "", ".."):
        with pytest.raises(ShardError, match="is refused"):
            remote_file_url("https://host/shards", name)
