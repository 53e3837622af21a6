"""Fetches files by URL: what may pass is tried again, what will not pass is told at once.

http and https are spoken here. webdataset would start curl for them, which repeats by itself for a minute, waits for
ever on a connection that has gone silent, and says no more of a failure than an exit status. s3 and gs go through
`aws s3 cp` and `gsutil cat`, without a shell; `pipe:` is a shell's. All other URLs go through webdataset.gopen: ais,
sftp, hf and what others registered there. A recipe file may name the first four alone (locations.py).

No message has a location's secrets in it, nor what a command was told.
"""

from __future__ import annotations

import base64
import http.client
import logging
import os
import random
import re
import select
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TypeVar

from crate_dist.data.index import ShardError
from crate_dist.locations import redacted, scrubbed

logger = logging.getLogger(__name__)

T = TypeVar("T")
_CHUNK = 2**20
_LEAST_BYTES = 2**16
_PASSING = frozenset((408, 425, 429))
"""Of the statuses 4xx, those that another attempt may mend."""
_GONE = frozenset((404, 410))
_NO_COMMAND = frozenset((126, 127))
_SAYS_GONE = re.compile(r"\(404\)|\(NoSuchKey\)|No URLs matched|NotFoundException: 404")
"""What `aws` and `gsutil` say of an object that is not there."""
_SHOWN = 300
"""Characters of a command's complaints that are shown."""
_jitter = random.SystemRandom()  # forked processes would share the state of any other


class Damaged(Exception):
    """The bytes that arrived are not those announced; another attempt may bring them."""


class Refused(Exception):
    """Another attempt would fail in the same way."""


class _Missing(Refused):
    """The server says that there is no such file."""


class NotThere(ShardError):
    """There is no such file: the server was reached, and said so."""


@dataclass(frozen=True)
class RetryPolicy:
    """The attempts at fetching a file, and the pauses between them.

    attempts: in all; first_delay_s, longest_delay_s: pause after the first failure, doubled after each, up to the
    longest, of which a random part between half and all is taken; silence_s: an attempt ends when fewer than 64 KiB
    have come in this time, or gone
    """

    attempts: int = 8
    first_delay_s: float = 0.5
    longest_delay_s: float = 30.0
    silence_s: float = 60.0

    def delay_s(self, failures: int) -> float:
        """Returns the pause after this number of failures, in seconds."""
        longest = min(self.first_delay_s * 2 ** (failures - 1), self.longest_delay_s)
        return longest * _jitter.uniform(0.5, 1.0)


def below(root: str, folder: str) -> str:
    """Returns the URL of a folder in a root. In a root with `{}`, such as `pipe:ssh host cat /data/{}`, it goes there.

    Raises ShardError for a name that a shell or a server could misread.
    """
    for name in folder.split("/"):
        check_name(name)
    return root.replace("{}", f"{folder}/{{}}") if "{}" in root else f"{root.rstrip('/')}/{folder}"


def remote_file_url(folder: str, name: str) -> str:
    """Returns the URL of a file in a folder. Raises ShardError for a name that a shell or a server could misread."""
    check_name(name)
    return folder.replace("{}", name) if "{}" in folder else f"{folder.rstrip('/')}/{name}"


def check_name(name: str) -> str:
    """Returns the name of a remote file. Raises ShardError as remote_file_url does."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]*", name):
        raise ShardError(f"a remote file called {name!r} is refused: names may hold letters, digits, and . _ - + =")
    return name


RETRIES = RetryPolicy()


def fetch(folder: str, name: str, take: Callable[[Iterator[bytes]], T], policy: RetryPolicy | None = None) -> T:
    """Gives the bytes of a file to `take`, in pieces and for each attempt from the start, and returns its result.

    folder, name: as for remote_file_url; take: may raise Damaged for what is to be fetched again

    Raises ShardError: with the file's place and the last failure; NotThere: there is none; of `take`'s own as they are.
    """
    url, how = remote_file_url(folder, name), policy or RETRIES

    def once() -> T:
        with closing(_chunks(url, how.silence_s)) as chunks:
            return take(chunks)

    place = f"{name} by {redacted(url)}" if url.startswith("pipe:") else redacted(url)
    return persist(once, "fetch", place, how)


def persist(
    once: Callable[[], T], verb: str, place: str, policy: RetryPolicy, pause: Callable[[float], object] = time.sleep
) -> T:
    """Calls `once` until it succeeds, as often as the policy says; verb, place: what it does where, for messages.

    Raises ShardError, or NotThere: it was refused, or has failed in every attempt; what may pass is its cause.
    """
    began = time.monotonic()
    for attempt in range(1, policy.attempts + 1):
        try:
            return once()
        except Refused as error:
            kind = NotThere if isinstance(error, _Missing) else ShardError
            raise kind(f"cannot {verb} {place}: {error}") from None
        except (OSError, http.client.HTTPException, Damaged) as error:
            failure, cause = _reason(error), error
        if attempt < policy.attempts:
            pause_s = policy.delay_s(attempt)
            logger.warning(
                "cannot %s %s: %s; attempt %d follows in %.1f s", *(verb, place, failure, attempt + 1, pause_s)
            )
            pause(pause_s)
    seconds = time.monotonic() - began
    raise ShardError(
        f"cannot {verb} {place}: {policy.attempts} attempts in {seconds:.0f} s, the last: {failure}"
    ) from cause


def _chunks(url: str, silence_s: float) -> Generator[bytes, None, None]:
    source = _http if re.match(r"https?://", url) else _run if _command(url) else _gopen
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
    response = answer(url, "GET", silence_s)
    with response:
        announced, came = response.headers.get("Content-Length"), 0
        while chunk := response.read1(_CHUNK):
            came += len(chunk)
            yield chunk
        if announced is not None and came != int(announced):
            raise Damaged(f"the connection ended after {came:,} of {int(announced):,} bytes")


def answer(
    url: str, method: str, silence_s: float, data: Iterable[bytes] | None = None, size: int = 0
) -> http.client.HTTPResponse:
    """Asks a server for a URL, user and password of which are for it alone; data: what it is given, size bytes.

    Raises Refused, OSError.
    """
    scheme, _, rest = url.partition("://")
    account, at, _ = re.split(r"[/?#]", rest, maxsplit=1)[0].rpartition("@")
    bare = f"{scheme}://{rest.removeprefix(account + at)}"
    headers = {"User-Agent": "crate-dist", "Accept-Encoding": "identity"}
    if data is not None:
        headers |= {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
    request = urllib.request.Request(bare, data, headers, method=method)
    if at:  # unredirected: for this host alone, not for another that it may point to
        token = base64.b64encode(urllib.parse.unquote_to_bytes(account)).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=silence_s)
    except urllib.error.HTTPError as error:
        error.close()
        if 300 <= error.code < 400:  # urllib's reason quotes where it was to go, with what is signed there
            kind = urllib.parse.urlsplit(error.url).scheme
            raise Refused(f"HTTP status {error.code}: where it leads ({kind}:) is not followed") from None
        if error.code < 500 and error.code not in _PASSING:
            kind_of_refusal = _Missing if error.code in _GONE else Refused
            raise kind_of_refusal(f"HTTP status {error.code} {error.reason}") from error
        raise OSError(f"HTTP status {error.code} {error.reason}") from error
    except (ValueError, http.client.InvalidURL):  # which quote the URL, or a part of it
        raise Refused("this is no URL that can be opened; odd characters in it are to be written as %XX") from None
    return response


def _command(url: str) -> list[str] | None:
    """Returns the words of the command that reads a URL; None for one that webdataset opens."""
    scheme, _, rest = url.partition(":")
    return {
        "pipe": ["/bin/sh", "-c", rest],
        "s3": ["aws", "s3", "cp", "--only-show-errors", url, "-"],
        "gs": ["gsutil", "cat", url],
    }.get(scheme)


def _run(url: str, silence_s: float) -> Generator[bytes, None, None]:
    command = _command(url)
    assert command
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except OSError as error:
        raise Refused(f"cannot run {command[0]}: {error.strerror}") from None
    with process:
        yield from _output(process, url, silence_s)


def _gopen(url: str, silence_s: float) -> Generator[bytes, None, None]:
    from webdataset.gopen import Pipe, gopen, gopen_schemes  # here, because webdataset imports torch

    if (scheme := url.partition(":")[0]) not in gopen_schemes:
        raise Refused(
            f"nothing here opens {scheme}: (webdataset has no gopen handler for it); https://, s3:// and pipe: do"
        )
    try:
        stream = gopen(url, "rb")
    except (ValueError, FileNotFoundError, PermissionError, ImportError) as error:
        raise Refused(scrubbed(str(error), url)) from None
    if isinstance(stream, Pipe):
        stream.ignore_errors = True  # of closing it; _output knows better
        with stream:
            yield from _output(stream.proc, url, silence_s)
        return
    with stream:
        while chunk := stream.read(_CHUNK):
            yield chunk


def _output(process: subprocess.Popen[bytes], url: str, silence_s: float) -> Generator[bytes, None, None]:
    """Yields what a command writes. The end of its complaints, if they are caught, becomes a part of the error."""
    assert process.stdout
    out, complaints, said = process.stdout.fileno(), process.stderr.fileno() if process.stderr else None, b""
    poll = select.poll()
    poll.register(out, select.POLLIN)
    if complaints is not None:
        poll.register(complaints, select.POLLIN)
    last = time.monotonic()
    try:
        while True:
            if (left_s := last + silence_s - time.monotonic()) <= 0:
                raise TimeoutError(f"nothing came in {silence_s:g} s{_quoted(said, url)}")
            ready = {descriptor for descriptor, _ in poll.poll(left_s * 1000)}
            if complaints is not None and complaints in ready:
                if not (more := os.read(complaints, _CHUNK)):
                    poll.unregister(complaints)
                said = (said + more)[-_CHUNK:]
            if out in ready:
                if not (chunk := os.read(out, _CHUNK)):
                    break
                yield chunk
                last = time.monotonic()
        try:
            status = process.wait(silence_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the command has not ended {silence_s:g} s after its last byte") from None
        if complaints is not None:
            os.set_blocking(complaints, False)
            with suppress(BlockingIOError):
                said += os.read(complaints, _CHUNK)
        judge(status, said, url)
    finally:
        process.kill()


def judge(status: int, said: bytes, url: str) -> None:
    """Raises Refused or OSError for a command that did not end with status 0; said: what it wrote to stderr."""
    if status in _NO_COMMAND:
        raise Refused(f"the command is not there or cannot be run (exit status {status}){_quoted(said, url)}")
    if status and url.startswith(("s3:", "gs:")) and _SAYS_GONE.search(said.decode(errors="replace")):
        raise _Missing(f"the command ended with exit status {status}{_quoted(said, url)}")
    if status:
        raise OSError(f"the command ended with exit status {status}{_quoted(said, url)}")


def _quoted(complaints: bytes, url: str) -> str:
    text = " ".join(scrubbed(complaints.decode(errors="replace"), url).split())[-_SHOWN:]
    return f": {text}" if text else ""


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError):
        return str(error.reason)
    return str(error) or type(error).__name__
