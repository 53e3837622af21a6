"""The folder of a cache: nobody else's, nothing else's, and on a file system whose locks hold.

    CACHEDIR.TAG            says that all the rest may be removed: crate-dist's word for it, and that of backup programs
    shards/, indexes/       see cache.py and splits.py
    room.lock, half-in-use, room-wanted

What is not in a folder with this tag is never removed, and the tag is put only into a new or an empty folder, or one
that holds what earlier versions left and no more. No open follows a symbolic link in there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crate_dist.config import CACHE_VARIABLE, DataSection
from crate_dist.data.index import ShardError

SHARD_FILE = re.compile(r"[0-9a-f]{64}\.(tar|part)")
"""Names of files that may lie in shards/, and be evicted from there."""
_TAG = "CACHEDIR.TAG"
_TAG_BEGINS = "Signature: 8a477f597d28d172789f06886806bc55\n# A cache of crate-dist"
_TAG_TEXT = f"{_TAG_BEGINS}, which it may be removed from at any time while nothing trains. See bford.info/cachedir\n"
_KNOWN = re.compile(
    r"shards|indexes|room\.lock|half-in-use|room-wanted|lost\+found|\.nfs[0-9a-f]+|\.CACHEDIR\.TAG\.[0-9a-f]+\.tmp"
)
FULL = (errno.ENOSPC, errno.EDQUOT)
"""The errors of a full disk."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_ANOTHER = f"name another folder as data.cache_dir or export {CACHE_VARIABLE}=DIR"
_LOCKS_OF_ONE_NODE = {
    "nfs": ("local_lock=flock", "local_lock=all", "nolock"),
    "nfs4": ("local_lock=flock", "local_lock=all", "nolock"),
    "lustre": ("localflock",),
    "cifs": ("nobrl",),
    "smb3": ("nobrl",),
    **dict.fromkeys(("fuse.sshfs", "fuse.rclone", "fuse.s3fs", "fuse.gcsfuse"), ("",)),
}
"""File systems that several nodes share, and mount options with which a lock is seen by the node alone that took it."""


def cache_folder(data: DataSection) -> Path:
    """Returns the folder where this node keeps the shards of a URL, made if need be.

    Chosen by the user, it may be a group's: everybody who can write there is trusted. The one in the temporary folder,
    where anybody can put something first, is this user's alone. Raises ShardError.
    """
    if chosen := data.cache_dir or os.environ.get(CACHE_VARIABLE):
        folder = Path(chosen).expanduser().absolute()
        make_folder(folder)
    else:
        folder = Path(tempfile.gettempdir()) / f"crate-cache-{os.geteuid()}"
        make_folder(folder, 0o700)
        _check_is_mine(folder)
    claim(folder)
    return folder


def claim(folder: Path) -> None:
    """Makes a folder a cache, unless it is one. Raises ShardError when it is something else, or can be none."""
    try:
        if folder.stat().st_mode & stat.S_IWOTH:
            raise ShardError(f"anybody may write to {folder}, and so change what is cached there; {_ANOTHER}")
        if not _has_tag(folder):
            others = sorted(path.name for path in folder.iterdir() if not _KNOWN.fullmatch(path.name))
            shards = folder / "shards"
            if not others and shards.is_dir():
                others = [f"shards/{path.name}" for path in shards.iterdir() if not SHARD_FILE.fullmatch(path.name)]
            if others:
                raise ShardError(
                    f"{folder} is no cache of this program, for it holds {', '.join(others[:3])}"
                    f"{' and more' if len(others) > 3 else ''}, and what is in a cache may be removed; name a new or "
                    f"empty folder, such as {folder / 'crate-cache'}, as data.cache_dir or in {CACHE_VARIABLE}"
                )
            _put_tag(folder)
        descriptor = os.open(folder / _TAG, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            lock(descriptor, fcntl.LOCK_SH)
        finally:
            close(descriptor)
    except OSError as error:
        raise unwritable(folder, error) from error
    if reason := locks_of_one_node(folder):
        raise ShardError(
            f"a lock in {folder} is seen by this node alone ({reason}), while others use the cache too; {_ANOTHER}, "
            "on a disk of the node itself"
        )


def make_folder(folder: Path, mode: int = 0o775) -> None:
    """Makes a folder of the cache. Raises ShardError when that, or writing in it, is not possible."""
    try:
        folder.mkdir(mode, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise unwritable(folder, error) from error


def make_subfolder(cache: Path, *names: str) -> Path:
    """Makes a folder in a cache that was claimed, for all who may write to that. Raises ShardError."""
    folder = cache
    for name in names:
        folder = folder / name
        make_folder(folder)
        try:
            _check_is_folder(folder)
        except OSError as error:
            raise unwritable(folder, error) from error
    return folder


def _check_is_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found, above = os.fstat(descriptor), folder.parent.stat()
        if found.st_mode & stat.S_IWOTH:
            raise ShardError(f"anybody may write to {folder}, and so change what is cached there; {_ANOTHER}")
        if above.st_mode & ~found.st_mode & stat.S_IWGRP and found.st_uid == os.geteuid():
            os.fchmod(descriptor, stat.S_IMODE(found.st_mode) | stat.S_IRWXG)
    finally:
        os.close(descriptor)


def open_file(path: Path, flags: int) -> int:
    """Opens a file in the cache, which everybody who may write to its folder may write to. Raises OSError."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    if flags & os.O_CREAT and path.parent.stat().st_mode & stat.S_IWGRP and os.fstat(descriptor).st_uid == os.geteuid():
        os.fchmod(descriptor, 0o664)
    return descriptor


@contextmanager
def unless_gone() -> Iterator[None]:
    """Leaves the block when what it works on is not there any more, removed by another process or another node."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            raise


def lock(descriptor: int, operation: int) -> None:
    """Locks as flock does. Raises BlockingIOError, and ShardError where the file system has no locks."""
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        where = os.readlink(f"/proc/self/fd/{descriptor}")
        raise ShardError(
            f"{where} cannot be locked: {error.strerror}; {_ANOTHER}, on a disk of the node itself"
        ) from None


def close(descriptor: int) -> None:
    """Unlocks and closes; closing alone would leave the lock to processes that were forked meanwhile."""
    try:
        lock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def unwritable(folder: Path, error: OSError) -> ShardError:
    """Returns what is to be raised when the cache cannot be written."""
    remedy = "make room there, lower data.cache_gb, or name another folder as" if error.errno in FULL else "see"
    return ShardError(f"cannot write the cache {folder}: {error.strerror or error}; {remedy} data.cache_dir")


def locks_of_one_node(folder: Path, mounts: str | None = None) -> str:
    """Says why other nodes that share the folder would not see a lock in it, or "".

    mounts: of /proc/self/mountinfo. Linux makes flock on NFS a lock of the server's, unless it was mounted otherwise.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return ""
    resolved, found = folder.resolve(), ("", "", "")
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4])
        if len(point) >= len(found[0]) and resolved.is_relative_to(point):  # of several in one place the last is seen
            kind, _, options = after.split(" ", 2)
            found = (point, kind, f"{options},{before.split()[5]}")
    _, kind, options = found
    for option in _LOCKS_OF_ONE_NODE.get(kind, ()):
        if not option or option in options.split(","):
            return f"{kind}, mounted with {option}" if option else kind
    return ""


def _check_is_mine(folder: Path) -> None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        what = "is a symbolic link" if stat.S_ISLNK(found.st_mode) else "is no folder"
    elif found.st_uid != os.geteuid():
        what = "is another user's"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        what = "can be written to by others"
    else:
        return
    raise ShardError(f"{folder} {what}, so it is not used as a cache; remove it, or {_ANOTHER}")


def _has_tag(folder: Path) -> bool:
    try:
        descriptor = os.open(folder / _TAG, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    with os.fdopen(descriptor, encoding="utf-8", errors="replace") as file:
        return file.read(len(_TAG_BEGINS)) == _TAG_BEGINS


def _put_tag(folder: Path) -> None:
    """Writes the tag whole at once, as others may look for it now, and with the mode that open_file gives."""
    beside = folder / f".{_TAG}.{secrets.token_hex(8)}.tmp"
    with os.fdopen(open_file(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "w", encoding="utf-8") as file:
        file.write(_TAG_TEXT)
    beside.replace(folder / _TAG)
