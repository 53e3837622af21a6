"""A web server on this machine that serves a folder, takes files for it as S3 does, and can be told to fail."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread
from urllib.parse import urlsplit

SILENCE_S = 1.0
"""For how long the fault "silent" says nothing; then the connection ends."""


class FolderServer(ThreadingHTTPServer):
    """Serves the files of a folder, and takes new ones: by PUT, plain or signed by `aws`, and DELETE.

    faults: by file name, what to do instead with the requests to come, one after the other; the last one stays when
    it is followed by "forever"; "302 URL" leads elsewhere
    put_faults: the same for files that come: a status, "drop", or "hang", which takes nothing and says nothing
    room: bytes that it still has room for; then its status is 507
    gets: requests by file name; puts, deletes: names of files that came and went, in their order
    asked: the query and the header Authorization of each
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.put_faults: dict[str, list[str]] = defaultdict(list)
        self.room = 10**12
        self.puts: list[str] = []
        self.deletes: list[str] = []
        self.released = Event()
        self.gets: Counter[str] = Counter()
        self.asked: set[tuple[str, str | None]] = set()
        self.whole: Counter[str] = Counter()
        self.on_get: Callable[[], None] = lambda: None
        self.lock = Lock()

    @property
    def url(self) -> str:
        """Of the folder."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def tars(self) -> dict[str, int]:
        """How often each shard was asked for, in the order of the first requests."""
        return {name: count for name, count in self.gets.items() if name.endswith(".tar")}

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are no news."""


class _Handler(BaseHTTPRequestHandler):
    server: FolderServer

    def do_GET(self) -> None:
        """Serves a file, or fails as told."""
        path = self.server.folder / urlsplit(self.path).path.lstrip("/")
        name = str(path.relative_to(self.server.folder))
        with self.server.lock:
            self.server.on_get()
            self.server.asked.add((urlsplit(self.path).query, self.headers.get("Authorization")))
            self.server.gets[name] += 1
            faults = self.server.faults[path.name]
            fault = faults[0] if faults else ""
            if faults and faults[1:] != ["forever"]:
                faults.pop(0)
        if fault.isdecimal():
            self.send_error(int(fault))
            return
        if fault.startswith("302 "):
            self.send_response(302)
            self.send_header("Location", fault.removeprefix("302 "))
            self.end_headers()
            return
        if fault == "drop":
            return
        if not path.is_file():
            self.send_error(404)
            return
        data = bytearray(path.read_bytes())
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "flip":
            data[len(data) // 2] ^= 1
        if fault in ("truncate", "silent"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            time.sleep(SILENCE_S if fault == "silent" else 0)
        elif fault == "slow":
            for first in range(0, len(data), 40_000):
                self.wfile.write(data[first : first + 40_000])
                time.sleep(0.05)
        else:
            self.wfile.write(data)
            with self.server.lock:
                self.server.whole[name] += 1

    def do_HEAD(self) -> None:
        """Says how long a file is."""
        path = self._path()
        self.send_response(200 if path.is_file() else 404)
        self.send_header("Content-Length", str(path.stat().st_size if path.is_file() else 0))
        self.send_header("Last-Modified", "Sat, 01 Jan 2000 00:00:00 GMT")
        self.end_headers()

    def do_PUT(self) -> None:
        """Takes a file whole, or fails as told."""
        path = self._path()
        with self.server.lock:
            faults = self.server.put_faults[path.name] or self.server.put_faults["*"]
            fault = faults[0] if faults else ""
            if faults and faults[1:] != ["forever"]:
                faults.pop(0)
        if fault == "hang":
            self.server.released.wait(60)
        if fault in ("drop", "hang"):
            self.close_connection = True
            return
        data = self._body()
        with self.server.lock:
            if not fault and len(data) > self.server.room:
                fault = "507"
            if not fault:
                self.server.room -= len(data)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_name(f".{path.name}").write_bytes(data)
                path.with_name(f".{path.name}").replace(path)
                self.server.puts.append(str(path.relative_to(self.server.folder)))
        self._answer(int(fault or 200))

    def do_DELETE(self) -> None:
        """Removes a file."""
        path = self._path()
        with self.server.lock:
            if there := path.is_file():
                path.unlink()
                self.server.deletes.append(str(path.relative_to(self.server.folder)))
        self._answer(204 if there else 404)

    def _path(self) -> Path:
        return self.server.folder / urlsplit(self.path).path.lstrip("/")

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.send_header("ETag", '"0"')
        self.end_headers()

    def _body(self) -> bytes:
        """Reads what comes: as it is, or in the signed pieces that S3's clients send."""
        if self.headers.get("Expect") == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return self.rfile.read(int(self.headers["Content-Length"]))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass  # trailers
        return b"".join(pieces)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@contextmanager
def serving(folder: Path) -> Iterator[FolderServer]:
    """Serves a folder until the block ends."""
    with FolderServer(folder) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.released.set()
        server.shutdown()
