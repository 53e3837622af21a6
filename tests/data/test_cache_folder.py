"""The cache is a folder of this program's and of nobody else's: nothing in it is followed, and nothing foreign goes."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from crate_dist.config import DataSection
from crate_dist.data.index import Remote, ShardError, ShardIndex
from crate_dist.data.reader import ShardReader
from crate_dist.data.remote.cache import ShardCache
from crate_dist.data.remote.cache_folder import cache_folder, claim, close, locks_of_one_node
from crate_dist.data.splits import open_split
from tests.servers import FolderServer, serving

A_SHARD = f"{'0' * 64}.tar"


@pytest.fixture
def server(cast_shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FolderServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(cast_shards) as running:
        yield running


@pytest.fixture
def default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache is when nobody says where."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("CRATE_CACHE", raising=False)
    return tmp_path / f"crate-cache-{os.geteuid()}"


def filled(index: ShardIndex, size: float = 1.5) -> ShardCache:
    """A cache with room for so many shards, after all of them went through it."""
    assert index.remote is not None
    cache = ShardCache(Remote(index.remote.url, index.remote.cache, int(size * max(s.bytes for s in index.shards))))
    for shard in index.shards:
        descriptor = cache.hold(shard)
        assert descriptor is not None
        close(descriptor)
    return cache


def test_the_default_cache_is_this_user_s_alone(default: Path, server: FolderServer) -> None:
    assert cache_folder(DataSection()) == default
    assert default.stat().st_mode & 0o777 == 0o700
    ShardReader(open_split(server.url, "train", DataSection())).read(0)
    assert (default / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")


@pytest.mark.parametrize("plant", ["link", "another's", "writable", "file"])
def test_what_somebody_else_put_in_the_default_s_place_is_not_used(
    plant: str, default: Path, tmp_path: Path, server: FolderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    (victim / "shards").mkdir(parents=True)
    (victim / "shards" / A_SHARD).write_bytes(b"mine")
    if plant == "link":
        default.symlink_to(victim)
    elif plant == "file":
        default.write_text("")
    else:
        default.mkdir(0o700)
        default.chmod(0o777 if plant == "writable" else 0o700)
    if plant == "another's":
        (tmp_path / "crate-cache-4242").mkdir(0o700)
        monkeypatch.setattr(os, "geteuid", lambda: 4242)
    with pytest.raises(ShardError, match="cannot write the cache" if plant == "file" else "not used as a cache"):
        open_split(server.url, "train", DataSection())
    assert sorted(path.name for path in victim.rglob("*")) == [A_SHARD, "shards"]
    assert (victim / "shards" / A_SHARD).read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["photos/a.jpg", "shards/imagenet-000000.tar", "shards/notes.txt"])
def test_a_folder_with_something_else_in_it_is_refused_with_what_to_do(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text("mine")
    with pytest.raises(ShardError, match=r"is no cache of this program, .*name a new or empty folder, such as"):
        cache_folder(DataSection(cache_dir=tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [name.partition("/")[0]]


def test_the_tag_of_another_program_makes_no_cache_of_ours(tmp_path: Path) -> None:
    (tmp_path / "CACHEDIR.TAG").write_text("Signature: 8a477f597d28d172789f06886806bc55\n# A cache of cargo\n")
    with pytest.raises(ShardError, match=r"it holds CACHEDIR\.TAG"):
        claim(tmp_path)


def test_a_cache_of_an_earlier_version_is_taken_up(server: FolderServer, tmp_path: Path) -> None:
    data = DataSection(cache_dir=tmp_path / "cache")
    before = ShardReader(open_split(server.url, "train", data)).read(0)
    (tmp_path / "cache" / "CACHEDIR.TAG").unlink()
    assert ShardReader(open_split(server.url, "train", data)).read(0) == before
    assert server.gets["train/train-000000.tar"] == 1
    assert (tmp_path / "cache" / "CACHEDIR.TAG").is_file()


def test_a_user_s_own_tar_survives_in_the_cache(server: FolderServer, tmp_path: Path) -> None:
    index = open_split(server.url, "train", DataSection(cache_dir=tmp_path / "cache"))
    filled(index)
    shards = tmp_path / "cache" / "shards"
    outside = tmp_path / "outside.tar"
    outside.write_bytes(b"mine" * 1000)
    (shards / "thesis.tar").write_bytes(b"mine" * 1000)
    (shards / A_SHARD).symlink_to(outside)
    for path in (shards / "thesis.tar", outside):
        os.utime(path, (0, 0))
    filled(index)
    assert (shards / "thesis.tar").read_bytes() == outside.read_bytes() == b"mine" * 1000


@pytest.mark.parametrize("planted", ["tar", "part", "room.lock", "index"])
def test_no_open_in_the_cache_follows_a_link(planted: str, server: FolderServer, tmp_path: Path) -> None:
    data, victim = DataSection(cache_dir=tmp_path / "cache"), tmp_path / "victim"
    index = open_split(server.url, "train", data)
    victim.write_bytes(b"mine")
    shard = index.shards[0].sha256
    if planted == "room.lock":
        link = tmp_path / "cache" / planted
    elif planted == "index":
        link = index.root / "index.part"
        (index.root / "index.json").unlink()
    else:
        (tmp_path / "cache" / "shards").mkdir()
        link = tmp_path / "cache" / "shards" / f"{shard}.{planted}"
    link.symlink_to(victim)
    if planted == "index":
        assert open_split(server.url, "train", data).num_samples == 200
    else:
        with pytest.raises(ShardError, match=r"cannot write the cache .*symbolic links"):
            ShardReader(open_split(server.url, "train", data)).read(0)
    assert victim.read_bytes() == b"mine"


def test_a_file_that_has_another_name_is_not_written_over(server: FolderServer, tmp_path: Path) -> None:
    data, victim = DataSection(cache_dir=tmp_path / "cache"), tmp_path / "victim"
    index = open_split(server.url, "train", data)
    victim.write_bytes(b"mine")
    (tmp_path / "cache" / "shards").mkdir()
    (tmp_path / "cache" / "shards" / f"{index.shards[0].sha256}.part").hardlink_to(victim)
    assert ShardReader(index).read(0)
    assert victim.read_bytes() == b"mine"


def test_a_group_may_share_a_cache_and_everybody_may_not(server: FolderServer, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(ShardError, match="anybody may write to"):
        cache_folder(DataSection(cache_dir=folder))
    folder.chmod(0o2770)
    before = os.umask(0o077)
    try:
        filled(open_split(server.url, "train", DataSection(cache_dir=folder)), size=9)
    finally:
        os.umask(before)
    for path in folder.rglob("*"):
        assert path.stat().st_mode & 0o060 == 0o060, path
        assert not path.stat().st_mode & 0o002, path


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_refused(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(ShardError, match=r"cannot be locked: .*on a disk of the node itself"):
        cache_folder(DataSection(cache_dir=tmp_path / "cache"))


def test_what_is_to_be_locked_exclusively_is_open_for_writing(
    server: FolderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As flock on NFS requires, where it is a byte-range lock of the server's."""
    flock = fcntl.flock

    def as_on_nfs(descriptor: int, operation: int) -> None:
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        if mode == (os.O_RDONLY if operation & fcntl.LOCK_EX else os.O_WRONLY) and not operation & fcntl.LOCK_UN:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", as_on_nfs)
    index = open_split(server.url, "train", DataSection(cache_dir=tmp_path / "cache"))
    filled(index)
    assert len(list((tmp_path / "cache" / "shards").iterdir())) < len(index.shards)  # it evicts


def test_a_shard_that_another_node_removed_is_fetched_again(
    server: FolderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = open_split(server.url, "train", DataSection(cache_dir=tmp_path / "cache"))
    whole = ShardReader(index).read(0)
    flock, stale = fcntl.flock, [True]

    def once_stale(descriptor: int, operation: int) -> None:
        where = os.readlink(f"/proc/self/fd/{descriptor}")
        if stale and where.endswith(".tar"):
            os.unlink(where)
            stale.clear()
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", once_stale)
    assert ShardReader(index).read(0) == whole
    assert server.gets["train/train-000000.tar"] == 2


@pytest.mark.parametrize(
    ("mounts", "reason"),
    [
        ("nfs4 srv:/x rw,vers=4.2,local_lock=none", ""),
        ("nfs srv:/x rw,vers=3,local_lock=flock", "nfs, mounted with local_lock=flock"),
        ("nfs srv:/x rw,vers=3,nolock,local_lock=all", "nfs, mounted with local_lock=all"),
        ("lustre mgs:/x rw,flock,lazystatfs", ""),
        ("lustre mgs:/x rw,localflock", "lustre, mounted with localflock"),
        ("fuse.sshfs me@host: rw", "fuse.sshfs"),
        ("ext4 /dev/sda1 rw", ""),
        ("nfs srv:/x rw,local_lock=all\n9 1 0:9 / /scratch\\040disk/of\\040node rw - xfs /dev/sdb rw", ""),
    ],
)
def test_locks_that_only_one_node_sees_are_found(mounts: str, reason: str) -> None:
    table = f"1 0 0:1 / / rw - nfs a:/ rw,local_lock=all\n2 1 0:2 / /scratch\\040disk rw shared:1 - {mounts}\n"
    assert locks_of_one_node(Path("/scratch disk/of node/cache"), table) == reason


def test_a_cache_whose_locks_other_nodes_do_not_see_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "crate_dist.data.remote.cache_folder.locks_of_one_node", lambda folder: "nfs, mounted with nolock"
    )
    with pytest.raises(ShardError, match=r"seen by this node alone \(nfs, mounted with nolock\).*of the node itself"):
        cache_folder(DataSection(cache_dir=tmp_path / "cache"))
