"""A bounded cache of remote shards on one node, shared by all processes and runs that name the same folder.

    shards/<sha256>.tar     a whole shard; it got its name after its digest was checked, and by rename
    shards/<sha256>.part    one that is being fetched, as large as it will be
    shards/<sha256>.sound   when its digest was last looked at, where the index has no checksums to tell by

Who fetches a shard holds an exclusive lock on its .part file, so that no two processes fetch the same one; who reads a
shard, or will soon, holds a shared lock on it. What nobody holds may be evicted, the least recently used first. Locks
are flock's: those of a process that dies are gone, and what it was fetching is overwritten or evicted. The folder
must be on a file system of the node itself, or on one whose flock works between nodes, as NFS's does; what it has to be
besides, and what is never removed from it, says cache_folder.py.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG

from crate_dist.data.index import Remote, Shard, ShardError
from crate_dist.data.remote.cache_folder import (
    FULL,
    SHARD_FILE,
    claim,
    close,
    lock,
    make_subfolder,
    open_file,
    unless_gone,
    unwritable,
)
from crate_dist.data.remote.fetch import Damaged, fetch

_POLL_S = 0.05
_NO_ROOM_HOLDS_S = 1.0
_CHUNK = 2**20
_STARTED = time.time()

logger = logging.getLogger(__name__)


class CacheIsFull(ShardError):
    """Everything in the cache is in use, and one more shard does not fit."""


class ShardCache:
    """Opens shards from the cache, fetching those that are not there.

    check: look at the digest of a shard that another run left there, once per node and start
    """

    def __init__(self, remote: Remote, check: bool = False) -> None:
        self._url, self._limit, self._check = remote.url, remote.cache_bytes, check
        claim(remote.cache)
        self._folder = make_subfolder(remote.cache, "shards")
        self._room, self._full = remote.cache / "room.lock", remote.cache / "half-in-use"
        self._wanted = remote.cache / "room-wanted"

    def hold(self, shard: Shard, ahead: bool = False) -> int | None:
        """Opens a shard and keeps it from eviction until the descriptor is closed. Fetches it when it is not there.

        ahead: do not wait when another process is fetching it (the result is None), and leave at least half of the
        cache to those who need a shard at once

        Raises
        ------
        CacheIsFull: everything in the cache is in use; for `ahead` half of it
        ShardError: the shard cannot be fetched, or the cache cannot be written
        """
        final, part = self._folder / f"{shard.sha256}.tar", self._folder / f"{shard.sha256}.part"
        try:
            while True:
                if (descriptor := _open_whole(final, shard.bytes)) is not None:
                    if not self._check or self._was_sound(descriptor, shard):
                        return descriptor
                    close(descriptor)
                elif (descriptor := _lock_new(part)) is not None:
                    if (fetched := self._fetched(descriptor, shard, part, final, ahead)) is not None:
                        return fetched
                elif ahead:
                    return None
                else:
                    time.sleep(_POLL_S)
        except OSError as error:
            raise unwritable(self._folder, error) from error

    def room_is_wanted(self) -> bool:
        """Tells whether a process found no room a moment ago for a shard that it needs at once."""
        return time.time() - _mtime(self._wanted) < _NO_ROOM_HOLDS_S

    def is_sound(self, descriptor: int, shard: Shard) -> bool:
        """Tells whether an open shard still has its digest. One that has not is no longer in the cache then."""
        digest, place = hashlib.sha256(), 0
        while chunk := os.pread(descriptor, _CHUNK, place):
            digest.update(chunk)
            place += len(chunk)
        if digest.hexdigest() == shard.sha256:
            return True
        logger.warning("%s was damaged in the cache %s; it is fetched again", shard.name, self._folder)
        if _is_at(descriptor, final := self._folder / f"{shard.sha256}.tar"):
            final.unlink(missing_ok=True)
        return False

    def _was_sound(self, descriptor: int, shard: Shard) -> bool:
        """Says what is_sound does, but looks only where no process of this node has since this one was started."""
        mark = self._folder / f"{shard.sha256}.sound"
        with locked(mark):
            if (found := _stat(mark)) is not None and found.st_size and found.st_mtime >= _STARTED:
                return True
            sound = self.is_sound(descriptor, shard)
            mark.write_text("sound\n" if sound else "")
            return sound

    def _fetched(self, descriptor: int, shard: Shard, part: Path, final: Path, ahead: bool) -> int | None:
        """Fills and publishes the locked part; None when another process did just before."""
        try:
            if not final.exists():
                self._allocate(descriptor, shard, ahead)
                fetch(self._url, shard.name, lambda chunks: self._take(chunks, descriptor, shard))
                os.fsync(descriptor)
                part.rename(final)
                lock(descriptor, fcntl.LOCK_SH)
                return descriptor
        except BaseException:
            _discard(part, descriptor)
            raise
        _discard(part, descriptor)
        return None

    def _take(self, chunks: Iterator[bytes], descriptor: int, shard: Shard) -> None:
        digest, place = hashlib.sha256(), 0
        for chunk in chunks:
            if place + len(chunk) > shard.bytes:
                raise Damaged(f"it is longer than the {shard.bytes:,} bytes in the index")
            digest.update(chunk)
            view = memoryview(chunk)
            while view:
                try:
                    written = os.pwrite(descriptor, view, place)
                except OSError as error:  # of ours and not of the server's, so no reason to fetch again
                    raise unwritable(self._folder, error) from error
                view, place = view[written:], place + written
        if place != shard.bytes:
            raise Damaged(f"it ended after {place:,} of the {shard.bytes:,} bytes in the index")
        if digest.hexdigest() != shard.sha256:
            raise Damaged("its sha256 is not the one in the index, which may be that of other shards")

    def _allocate(self, descriptor: int, shard: Shard, ahead: bool) -> None:
        """Reserves the bytes of a shard, evicting others. Raises CacheIsFull, and OSError when the disk is full."""
        if ahead and time.time() - _mtime(self._full) < _NO_ROOM_HOLDS_S:
            raise CacheIsFull(
                "half of the cache is in use"
            )  # found a moment ago, and finding out means trying every lock
        with locked(self._room):
            files: dict[Path, os.stat_result] = {}
            for there in [there for there in self._folder.iterdir() if SHARD_FILE.fullmatch(there.name)]:
                for name in (there, there.with_suffix(".tar")):  # a part may have got its name meanwhile
                    if (stat := _stat(name)) is not None and S_ISREG(stat.st_mode):
                        files[name] = stat
                        break
            total, allowed = sum(stat.st_size for stat in files.values()), self._limit // (2 if ahead else 1)
            if total + shard.bytes > allowed:
                held = sum(stat.st_size for path, stat in files.items() if _in_use(path))
                if held + shard.bytes > allowed:
                    _touch(self._full)
                    if not ahead:
                        _touch(self._wanted)
                    raise self._no_room(held, shard)
            oldest = iter(sorted(files, key=lambda path: files[path].st_mtime))
            while (crowded := total + shard.bytes > self._limit) or not _reserve(descriptor, shard.bytes):
                if (path := next(oldest, None)) is None:
                    raise self._no_room(total, shard) if crowded else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if _evict(path):
                    total -= files[path].st_size

    def _no_room(self, held: int, shard: Shard) -> CacheIsFull:
        return CacheIsFull(
            f"the cache {self._folder.parent} is too small: {held / 1e9:.3g} of its {self._limit / 1e9:.3g} GB are in "
            f"use at this moment, and {shard.name} needs {shard.bytes / 1e9:.3g} more; raise data.cache_gb"
        )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the exclusive lock of a file, which is made if need be and stays."""
    descriptor = open_file(path, os.O_RDWR | os.O_CREAT)
    try:
        lock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        close(descriptor)


def _open_whole(path: Path, size: int) -> int | None:
    """Opens a file under a shared lock; None when there is no such file of that size."""
    with unless_gone():
        descriptor = open_file(path, os.O_RDONLY)
        try:
            lock(descriptor, fcntl.LOCK_SH)  # waits no longer than another process takes to look whether it is idle
            stat = os.fstat(descriptor)
            if stat.st_nlink and stat.st_size == size:
                with suppress(PermissionError):  # another user's, in a cache that is a group's
                    os.utime(descriptor)
                return descriptor
            if stat.st_nlink:
                path.unlink(missing_ok=True)  # truncated by something else than this program
        except BaseException:
            os.close(descriptor)
            raise
        close(descriptor)
    return None


def _lock_new(path: Path) -> int | None:
    """Makes or takes over a file that nobody has locked; None when somebody has."""
    descriptor = open_file(path, os.O_RDWR | os.O_CREAT)
    if _try_lock(descriptor) and _is_at(descriptor, path):
        if os.fstat(descriptor).st_nlink == 1:
            return descriptor
        path.unlink()  # it is a file of some other place too, which is not to be written over
    close(descriptor)
    return None


def _discard(part: Path, descriptor: int) -> None:
    if _is_at(descriptor, part):
        part.unlink(missing_ok=True)
    close(descriptor)


def _evict(path: Path) -> bool:
    """Removes a file that nobody holds."""
    with unless_gone():
        descriptor = _open_to_lock(path)
        try:
            if _try_lock(descriptor) and _is_at(descriptor, path):
                path.unlink(missing_ok=True)
                return True
        finally:
            close(descriptor)
    return False


def _in_use(path: Path) -> bool:
    with unless_gone():
        descriptor = _open_to_lock(path)
        try:
            return not _try_lock(descriptor)
        finally:
            close(descriptor)
    return False


def _open_to_lock(path: Path) -> int:
    """Opens a file for writing if that is allowed, since NFS locks exclusively only what is open for it."""
    try:
        return open_file(path, os.O_RDWR)
    except PermissionError:
        return open_file(path, os.O_RDONLY)


def _try_lock(descriptor: int) -> bool:
    try:
        lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    stat = _stat(path)
    return stat is not None and os.path.samestat(os.fstat(descriptor), stat)


def _stat(path: Path) -> os.stat_result | None:
    with unless_gone():
        return path.lstat()
    return None


def _mtime(path: Path) -> float:
    stat = _stat(path)
    return stat.st_mtime if stat else 0.0


def _touch(path: Path) -> None:
    descriptor = open_file(path, os.O_WRONLY | os.O_CREAT)
    try:
        os.utime(descriptor)
    finally:
        os.close(descriptor)


def _reserve(descriptor: int, size: int) -> bool:
    """Gives a file its size and its place on the disk; False when the disk is full."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in FULL:
            return False
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)
    return True
