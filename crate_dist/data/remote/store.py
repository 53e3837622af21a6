"""Puts files into a folder or behind a URL, reads and removes them there: what fetch.py does, the other way too.

http and https by PUT and DELETE; s3 and gs by `aws` and `gsutil`, without a shell, which read from a pipe, or from a
finished file what has to be whole though this process dies. A folder is one of another mount, and has to be there.
"""

from __future__ import annotations

import hashlib
import io
import os
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from crate_dist.data.index import ShardError
from crate_dist.data.remote.fetch import (
    Damaged,
    NotThere,
    Refused,
    RetryPolicy,
    answer,
    below,
    check_name,
    fetch,
    judge,
    persist,
    remote_file_url,
)
from crate_dist.files import written_whole
from crate_dist.locations import redacted

T = TypeVar("T")
_CHUNK = 2**20
_CONNECTING_S = 10
_LOOK_EVERY_S = 0.2

STORING = RetryPolicy(attempts=4, first_delay_s=1.0)
LOOKING = RetryPolicy(attempts=3, first_delay_s=1.0, longest_delay_s=2.0, silence_s=15.0)
"""For one small file, while somebody waits."""


class Stopped(ShardError):
    """The transfer was stopped from outside."""


class Store:
    """A place for files: a folder that is there, or a URL below which files can be put.

    stop: once it is set, transfers end with Stopped
    """

    def __init__(
        self,
        place: Path | str,
        policy: RetryPolicy = STORING,
        stop: threading.Event | None = None,
        root: Path | None = None,
    ) -> None:
        self._place, self._policy, self._stop = place, policy, stop or threading.Event()
        self._root = root or place

    def __str__(self) -> str:
        return redacted(self._place)

    @property
    def root(self) -> str:
        """The place that this one is in, and that has to be there."""
        return redacted(self._root)

    def is_empty_folder(self) -> bool:
        """Tells whether the root is a folder with nothing in it: a new one, or where something is not mounted."""
        with suppress(OSError):
            return isinstance(self._root, Path) and not any(self._root.iterdir())
        return False

    def below(self, name: str) -> Store:
        """Returns the store of a folder in this one, which need not be there. Raises ShardError for an odd name."""
        root = self._root if isinstance(self._root, Path) else None
        place = self._place / check_name(name) if isinstance(self._place, Path) else below(self._place, name)
        return Store(place, self._policy, self._stop, root)

    def stop(self) -> None:
        """Ends the transfers that are under way, and those to come."""
        self._stop.set()

    def get(self, name: str, take: Callable[[Iterator[bytes]], T], policy: RetryPolicy | None = None) -> T:
        """Gives the bytes of a file to `take`, as fetch does. Raises ShardError; NotThere: there is no such file."""
        how = policy or self._policy
        if isinstance(self._place, str):
            return fetch(self._place, name, lambda chunks: take(self._until_stopped(chunks)), how)
        path = self._place / check_name(name)

        def once() -> T:
            self._look_at_root()
            try:
                with path.open("rb") as file:
                    return take(self._until_stopped(_read(file)))
            except FileNotFoundError:
                raise NotThere(f"cannot fetch {path}: there is no such file") from None

        return persist(once, "fetch", str(path), how, self._pause)

    def put(
        self, name: str, source: Path | bytes, size: int | None = None, policy: RetryPolicy | None = None
    ) -> tuple[int, str]:
        """Puts a file, whole or not at all, and returns its bytes and their SHA-256.

        source: what is given as bytes is whole there also when this process is killed meanwhile; of a file, a command
        may then store the beginning
        size: of a file that grows, the bytes from its beginning that are wanted

        Raises ShardError; OSError: the source cannot be opened.
        """
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            bytes_ = (
                size
                if size is not None
                else len(source)
                if isinstance(source, bytes)
                else os.fstat(file.fileno()).st_size
            )

            def once() -> str:
                file.seek(0)
                digest = hashlib.sha256()
                chunks = _hashed(self._until_stopped(_read(file, bytes_)), digest.update)
                self._send(name, chunks, bytes_, isinstance(source, bytes))
                return digest.hexdigest()

            return bytes_, persist(once, "write", self._shown(name), policy or self._policy, self._pause)

    def remove(self, name: str) -> None:
        """Removes a file; one that is not there is no error. Raises ShardError."""

        def once() -> None:
            if isinstance(self._place, Path):
                (self._place / check_name(name)).unlink(missing_ok=True)
                with suppress(OSError):  # not empty
                    self._place.rmdir()
                return
            url = remote_file_url(self._place, name)
            if command := _command(url, remove=True):
                self._run(command, url, iter(()), True)
            else:
                answer(url, "DELETE", self._policy.silence_s).close()

        with suppress(NotThere):
            persist(once, "remove", self._shown(name), self._policy, self._pause)

    def _send(self, name: str, chunks: Iterator[bytes], size: int, at_once: bool) -> None:
        if isinstance(self._place, Path):
            self._look_at_root()
            self._place.mkdir(parents=True, exist_ok=True)
            with written_whole(self._place / check_name(name)) as file:
                for chunk in chunks:
                    file.write(chunk)
            return
        url = remote_file_url(self._place, name)
        if command := _command(url, size=size):
            self._run(command, url, chunks, at_once)
        else:
            answer(url, "PUT", self._policy.silence_s, chunks, size).close()

    def _run(self, command: Sequence[str], url: str, chunks: Iterator[bytes], at_once: bool) -> None:
        """Runs a command that reads the chunks; in a session of its own, so that no Ctrl-C ends it before us.

        at_once: they are all there before it begins. Behind a pipe, our death is to it the end of the file.
        """
        silence_s = self._policy.silence_s
        with tempfile.TemporaryFile() as complaints, tempfile.TemporaryFile() as whole:
            if at_once:
                whole.writelines(chunks)
                whole.seek(0)
            source = whole if at_once else subprocess.PIPE
            try:
                process = subprocess.Popen(
                    command, stdin=source, stdout=complaints, stderr=complaints, start_new_session=True
                )
            except OSError as error:
                raise Refused(f"cannot run {command[0]}: {error.strerror}") from None
            try:
                if not at_once:
                    with suppress(BrokenPipeError):  # its status says why
                        self._feed(process, chunks)
                self._await(process, 2 * silence_s)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # `aws` may be a wrapper's child
                    process.wait()
            complaints.seek(0)
            judge(process.returncode, complaints.read(_CHUNK), url)

    def _feed(self, process: subprocess.Popen[bytes], chunks: Iterator[bytes]) -> None:
        assert process.stdin
        with process.stdin as pipe:
            os.set_blocking(pipe.fileno(), False)
            poll = select.poll()
            poll.register(pipe.fileno(), select.POLLOUT)
            for chunk in chunks:
                view, last = memoryview(chunk), time.monotonic()
                while view:
                    self._check()
                    if poll.poll(_LOOK_EVERY_S * 1000):
                        view = view[os.write(pipe.fileno(), view) :]
                    elif time.monotonic() - last > self._policy.silence_s:
                        raise TimeoutError(f"less than 1 MiB went in {self._policy.silence_s:g} s")

    def _await(self, process: subprocess.Popen[bytes], limit_s: float) -> None:
        until = time.monotonic() + limit_s
        while True:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LOOK_EVERY_S)
                return
            self._check()
            if time.monotonic() > until:
                raise TimeoutError(f"the command has not ended {limit_s:g} s after its last byte")

    def _until_stopped(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self._check()
            yield chunk

    def _check(self) -> None:
        if self._stop.is_set():
            raise Stopped(f"{self} was left before its transfer was over")

    def _pause(self, seconds: float) -> None:
        self._stop.wait(seconds)
        self._check()

    def _look_at_root(self) -> None:
        """Raises Refused when a folder is not there, which might be a mount."""
        if isinstance(self._root, Path) and not self._root.is_dir():
            raise Refused(f"there is no folder {self._root}; is something not mounted? A new one is to be made by hand")

    def _shown(self, name: str) -> str:
        place = self._place
        return str(place / name) if isinstance(place, Path) else redacted(remote_file_url(place, name))


def taking(path: Path, size: int, sha256: str) -> Callable[[Iterator[bytes]], None]:
    """Returns what writes the bytes of a file to the disk, for Store.get; it raises Damaged for other ones."""

    def take(chunks: Iterator[bytes]) -> None:
        digest, came = hashlib.sha256(), 0
        with path.open("wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                came += len(chunk)
                if came > size:
                    raise Damaged(f"it is longer than the {size:,} bytes that it had")
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if came != size:
            raise Damaged(f"it has {came:,} bytes, not {size:,}")
        if digest.hexdigest() != sha256:
            raise Damaged("it does not have its sha256 any more")

    return take


def _command(url: str, size: int = 0, remove: bool = False) -> list[str] | None:
    """Returns the words of the command that writes its input to a URL, or removes what is there; None for http."""
    scheme = url.partition(":")[0]
    if scheme == "s3":
        patience = ["--only-show-errors", "--cli-connect-timeout", str(_CONNECTING_S)]
        return [
            "aws",
            "s3",
            *(("rm", *patience, url) if remove else ("cp", *patience, "--expected-size", str(size), "-", url)),
        ]
    if scheme == "gs":
        return ["gsutil", "-q", *(("rm", url) if remove else ("cp", "-", url))]
    return None


def _read(file: BinaryIO, size: int | None = None) -> Iterator[bytes]:
    left = size
    while chunk := file.read(_CHUNK if left is None else min(_CHUNK, left)):
        yield chunk
        left = None if left is None else left - len(chunk)
    if left:
        raise Refused(f"{left:,} bytes are missing at the end of the file that is to be written there")


def _hashed(chunks: Iterator[bytes], update: Callable[[bytes], None]) -> Iterator[bytes]:
    for chunk in chunks:
        update(chunk)
        yield chunk
