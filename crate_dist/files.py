"""Files that are written whole or not at all, and files that only grow."""

from __future__ import annotations

import errno
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "quota exceeded", errno.EFBIG: "file size limit exceeded"}
"""Numbers of errors that more room would mend, and what they say."""
_CANNOT_SYNC_FOLDERS = (errno.EACCES, errno.EINVAL, errno.ENOTSUP)  # one that may not be listed; SMB, some FUSE
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing that takes its name when the block ends well, so that nobody ever sees a part of it.

    Before that it is synced, after that its folder. When the block raises, what stood under the name still does.

    Raises OSError: it cannot be written; its filename is `path`.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if error.filename in (None, str(beside)):  # a full disk has no name of its own
            error.filename = str(path)
        raise
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a small text file as `written_whole` does."""
    with written_whole(path) as file:
        file.write(text.encode())


def write_first(path: Path, text: str) -> None:
    """Writes a small text file as `written_whole` does, unless there is one: of all machines' writers one succeeds."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(beside, path)
        except FileExistsError:
            return
        except OSError:  # a file system without links
            beside.replace(path)
        sync_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk, so that they survive a power cut, where the file system can do so."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC_FOLDERS:
            raise


class AppendedFile:
    """A file that is written without a buffer: a record is in the kernel's hands when `append` returns.

    A disk that is full for a while is no reason to end a training: it is said once, and nothing is lost but by a
    crash meanwhile.

    check: raises LostTheRun when the file is another job's now, OSError when that cannot be seen; see run.lock.Tenure
    """

    def __init__(self, path: Path, check: Callable[[], None] = lambda: None) -> None:
        self._path, self._check = path, check
        self._descriptor = os.open(path, _APPEND, 0o666)
        self._waiting = b""
        self._failing = False

    def append(self, record: bytes) -> None:
        """Writes at the end of the file, behind what is still waiting."""
        self._waiting += record
        try:
            self._check()
            while self._waiting:
                self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]
        except OSError as error:
            if not self._failing:
                logger.error("cannot write %s: %s; what belongs there is kept until it can", self._path, error)
            self._failing = True
        else:
            self._failing = False

    def sync(self) -> None:
        """Brings what was written to the disk. A file that was put in the place of this one is gone on with."""
        self.append(b"")
        try:
            if not self._path.exists() or not os.path.samestat(os.stat(self._path), os.fstat(self._descriptor)):
                logger.error(
                    "%s was replaced under this program, which goes on in the file that is there now", self._path
                )
                before, self._descriptor = self._descriptor, os.open(self._path, _APPEND, 0o666)
                os.close(before)
            os.fsync(self._descriptor)
        except OSError as error:
            logger.error("cannot sync %s: %s", self._path, error.strerror)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)


def whole_lines(path: Path) -> list[str]:
    """Reads the lines of a text file, none if there is no file, without a last one that is not whole (yet)."""
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1].decode("utf-8", errors="replace").splitlines()


def lines_backwards(path: Path, at_most: int | None = None, block: int = 1 << 16) -> Iterator[str]:
    """Yields the whole lines of a text file, the last one first, reading no more of it than is asked for.

    at_most: bytes to read of its end; None: all of them
    Of a file that is not there, or that shrinks meanwhile, there are none, or none further.
    """
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            first, whole, rest = max(end - at_most, 0) if at_most else 0, False, b""
            while end > first:
                begin = max(end - block, first)
                file.seek(begin)
                data = file.read(end - begin)
                end = begin
                if not whole:  # behind the last newline stands nothing, or a line that is being written
                    newline = data.rfind(b"\n")
                    if newline < 0:
                        continue
                    data, whole = data[:newline], True
                rest, *lines = (data + rest).split(b"\n")
                for line in reversed(lines):
                    yield line.decode("utf-8", errors="replace")
            if whole and not first:
                yield rest.decode("utf-8", errors="replace")
    except FileNotFoundError:
        return


def mended_lines(path: Path) -> list[str]:
    """Reads as whole_lines does, and removes from the file a last line that a crash has cut off."""
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    return whole_lines(path)
