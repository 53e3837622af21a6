"""Files that are written whole or not at all, and files that only grow."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC


def write_whole(path: Path, text: str) -> None:
    """Writes a small text file so that a reader sees the old one or the new one, also after a crash."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


class AppendedFile:
    """Written without a buffer, so that a record is in the kernel's hands when `append` returns.

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
        """At the end of the file, behind what is still waiting."""
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
        """Nothing more is appended."""
        os.close(self._descriptor)


def whole_lines(path: Path) -> list[str]:
    """The lines of a text file, none if there is no file; without a last one that is not whole (yet)."""
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1].decode("utf-8", errors="replace").splitlines()


def mended_lines(path: Path) -> list[str]:
    """The lines of a text file that nobody writes, as whole_lines; a last one that a crash has cut off is removed."""
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    return whole_lines(path)
