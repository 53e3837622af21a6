"""Fetches files by URL, with patience: what may pass is tried again, what will not pass is told at once.

http and https are spoken here. webdataset would start curl for them, which repeats by itself for a minute, waits for
ever on a connection that has gone silent, and says no more of a failure than an exit status. All other URLs go through
webdataset.gopen: gs, ais, sftp, hf, `pipe:` and what others registered there; s3, which it does not know, through
`aws s3 cp`.
"""

from __future__ import annotations

import http.client
import logging
import os
import random
import re
import select
import shlex
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

from crate_dist.data.index import ShardError

logger = logging.getLogger(__name__)

T = TypeVar("T")
_CHUNK = 2**20
_LEAST_BYTES = 2**16
_PASSING = frozenset((408, 425, 429))
"""Of the statuses 4xx, those that another attempt may mend."""
_NO_COMMAND = frozenset((126, 127))
_jitter = random.SystemRandom()  # forked processes would share the state of any other


class Damaged(Exception):
    """What arrived is not what was announced; another attempt may bring it."""


class _Refused(Exception):
    """Another attempt would fail in the same way."""


@dataclass(frozen=True)
class Patience:
    """How long to go on trying.

    attempts: in all; first_delay_s, longest_delay_s: pause after the first failure, doubled after each, up to the
    longest, of which a random part between half and all is taken; silence_s: an attempt ends when fewer than 64 KiB
    have come in this time
    """

    attempts: int = 8
    first_delay_s: float = 0.5
    longest_delay_s: float = 30.0
    silence_s: float = 60.0

    def delay_s(self, failures: int) -> float:
        """The pause after so many failures."""
        longest = min(self.first_delay_s * 2 ** (failures - 1), self.longest_delay_s)
        return longest * _jitter.uniform(0.5, 1.0)


def below(root: str, folder: str) -> str:
    """The URL of a folder in a root. In a root with `{}`, such as `pipe:ssh host cat /data/{}`, it goes there."""
    return root.replace("{}", f"{folder}/{{}}") if "{}" in root else f"{root.rstrip('/')}/{folder}"


def file_url(folder: str, name: str) -> str:
    """The URL of a file in a folder. Raises ShardError for a name that a shell or a server could misread."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]*", name):
        raise ShardError(f"a remote file called {name!r} is refused: names may hold letters, digits, and . _ - + =")
    return folder.replace("{}", name) if "{}" in folder else f"{folder.rstrip('/')}/{name}"


PATIENCE = Patience()


def fetch(url: str, take: Callable[[Iterator[bytes]], T]) -> T:
    """Gives the bytes of a URL to `take`, in pieces and for each attempt from the start, and returns its result.

    take: may raise Damaged for what is not as it should be, so that it is fetched again

    Raises
    ------
    ShardError: with the URL and the last failure; of `take`'s own as they are
    """
    patience, began = PATIENCE, time.monotonic()
    for attempt in range(1, patience.attempts + 1):
        try:
            with closing(_chunks(url, patience.silence_s)) as chunks:
                return take(chunks)
        except _Refused as error:
            raise ShardError(f"cannot fetch {url}: {error}") from error
        except (OSError, http.client.HTTPException, Damaged) as error:
            failure, cause = _reason(error), error
        if attempt < patience.attempts:
            pause_s = patience.delay_s(attempt)
            logger.warning("fetching %s: %s; attempt %d follows in %.1f s", url, failure, attempt + 1, pause_s)
            time.sleep(pause_s)
    seconds = time.monotonic() - began
    raise ShardError(
        f"cannot fetch {url}: {patience.attempts} attempts in {seconds:.0f} s, the last: {failure}"
    ) from cause


def _chunks(url: str, silence_s: float) -> Generator[bytes, None, None]:
    source = _http if re.match(r"https?://", url) else _gopen
    since, came = time.monotonic(), 0
    with closing(source(url, silence_s)) as chunks:
        for chunk in chunks:
            yield chunk
            came += len(chunk)
            if came >= _LEAST_BYTES:
                since, came = time.monotonic(), 0
            elif time.monotonic() - since > silence_s:
                raise TimeoutError(f"only {came} bytes came in {silence_s:g} s")


def _http(url: str, silence_s: float) -> Generator[bytes, None, None]:
    request = urllib.request.Request(url, headers={"User-Agent": "crate-dist", "Accept-Encoding": "identity"})
    try:
        response = urllib.request.urlopen(request, timeout=silence_s)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code < 500 and error.code not in _PASSING:
            raise _Refused(f"HTTP status {error.code} {error.reason}") from error
        raise OSError(f"HTTP status {error.code} {error.reason}") from error
    except ValueError as error:
        raise _Refused(str(error)) from error
    with response:
        announced, came = response.headers.get("Content-Length"), 0
        while chunk := response.read1(_CHUNK):
            came += len(chunk)
            yield chunk
        if announced is not None and came != int(announced):
            raise Damaged(f"the connection ended after {came:,} of {int(announced):,} bytes")


def _gopen(url: str, silence_s: float) -> Generator[bytes, None, None]:
    from webdataset.gopen import Pipe, gopen, gopen_schemes  # here, because webdataset imports torch

    if url.startswith("s3://") and "s3" not in gopen_schemes:
        url = f"pipe:aws s3 cp --only-show-errors {shlex.quote(url)} -"
    try:
        stream = gopen(url, "rb")
    except (ValueError, FileNotFoundError, PermissionError, ImportError) as error:
        raise _Refused(str(error)) from error
    if isinstance(stream, Pipe):
        yield from _output(stream, silence_s)
        return
    with stream:
        while chunk := stream.read(_CHUNK):
            yield chunk


def _output(pipe: Any, silence_s: float) -> Generator[bytes, None, None]:
    """What a command writes. Its errors are not kept: they stand in the log, where its stderr goes."""
    descriptor = pipe.stream.fileno()
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    try:
        while True:
            if not poll.poll(silence_s * 1000):
                raise TimeoutError(f"nothing came in {silence_s:g} s")
            if not (chunk := os.read(descriptor, _CHUNK)):
                break
            yield chunk
        status = pipe.proc.wait(silence_s)
        if status in _NO_COMMAND:
            raise _Refused(f"the command is not there or cannot be run (exit status {status})")
        if status:
            raise OSError(f"the command ended with exit status {status}")
    finally:
        pipe.proc.kill()
        pipe.ignore_errors = True
        pipe.close()


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError):
        return str(error.reason)
    return str(error) or type(error).__name__
