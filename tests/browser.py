"""Opens TensorBoard in a headless Chromium: for a test, and for the picture of docs/dashboard.md.

    python -m tests.browser runs/demo docs/pictures/dashboard.png

The runs beside the named one are shown too. TensorBoard runs in this process, at a port that is free.
"""

from __future__ import annotations

import asyncio
import base64
import html
import json
import logging
import re
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tornado.websocket import WebSocketClientConnection, websocket_connect

from crate_dist.arguments import Parser
from crate_dist.run.dashboard import address
from crate_dist.run.folder import RunFolder

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1600,1000")
_WAIT_S = 60.0
_IS_DRAWN = "document.querySelectorAll('line-chart').length > 3 && !document.querySelector('mat-spinner')"
_DRAWING_S = 5.0  # the lines come with a movement of their own
_CLOSE_SETTINGS = "[...document.querySelectorAll('button')].find(b => b.innerText.includes('Settings')).click()"


@contextmanager
def tensorboard(runs: Path) -> Iterator[str]:
    """Gives the address of a TensorBoard that has read what lies below a folder."""
    from tensorboard.program import TensorBoard

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    server = TensorBoard()
    server.configure(argv=["tensorboard", "--logdir", str(runs), "--port", "0", "--load_fast=false"])
    url, until = server.launch(), time.monotonic() + _WAIT_S
    while urllib.request.urlopen(f"{url}data/plugin/scalars/tags").read() == b"{}":
        if time.monotonic() > until:
            raise TimeoutError(f"TensorBoard has read nothing below {runs} in {_WAIT_S:.0f} s")
        time.sleep(0.1)
    yield url


def overview(url: str, folder: RunFolder) -> str:
    """Returns the address that crate-dist prints, of the TensorBoard at `url` instead."""
    return url + address(folder).split("/", 3)[3]


def page(url: str) -> str:
    """Returns the words that stand on a page, a space between them."""
    assert CHROMIUM, "there is no Chromium"
    line = [CHROMIUM, *_OPTIONS, "--virtual-time-budget=15000", "--dump-dom", url]
    done = subprocess.run(line, check=True, capture_output=True, text=True, timeout=_WAIT_S)
    bare = re.sub(r"<(style|script)\b.*?</\1>|<[^>]+>", " ", done.stdout, flags=re.DOTALL)
    return " ".join(html.unescape(bare).split())


async def picture(url: str, out: Path) -> None:
    """Writes what a browser of 1600 x 1000 pixels shows of TensorBoard, once the curves are drawn; without settings."""
    assert CHROMIUM, "there is no Chromium"
    with tempfile.TemporaryDirectory() as profile:
        line = [CHROMIUM, *_OPTIONS, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
        with subprocess.Popen(line, stderr=subprocess.DEVNULL) as chromium:
            try:
                page = await _Page.of(Path(profile) / "DevToolsActivePort")
                await page.call("Page.navigate", url=url)
                await page.until(_IS_DRAWN)
                await page.call("Runtime.evaluate", expression=_CLOSE_SETTINGS)
                await asyncio.sleep(_DRAWING_S)
                shown = await page.call("Page.captureScreenshot")
                out.write_bytes(base64.b64decode(shown["data"]))
            finally:
                chromium.terminate()


class _Page:
    """A page of a Chromium, by its DevTools protocol."""

    def __init__(self, socket: WebSocketClientConnection) -> None:
        self._socket, self._calls = socket, 0

    @classmethod
    async def of(cls, port_file: Path) -> _Page:
        until = time.monotonic() + _WAIT_S
        while not (port_file.exists() and port_file.read_text()) and time.monotonic() < until:
            await asyncio.sleep(0.1)
        port = port_file.read_text().split()[0]
        pages = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
        [address] = [page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page"]
        return cls(await websocket_connect(address, max_message_size=1 << 28))

    async def call(self, method: str, **parameters: object) -> dict[str, Any]:
        self._calls += 1
        await self._socket.write_message(json.dumps({"id": self._calls, "method": method, "params": parameters}))
        while True:
            message = json.loads(await self._socket.read_message() or "{}")
            if message.get("id") == self._calls:
                result: dict[str, Any] = message["result"]
                return result

    async def until(self, condition: str) -> None:
        until = time.monotonic() + _WAIT_S
        while not (await self.call("Runtime.evaluate", expression=condition))["result"].get("value"):
            if time.monotonic() > until:
                raise TimeoutError(f"not so within {_WAIT_S:.0f} s: {condition}")
            await asyncio.sleep(0.2)


if __name__ == "__main__":
    parser = Parser(prog="python -m tests.browser", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("out", type=Path, metavar="FILE", help="the picture to write, a PNG")
    arguments = parser.parse_args()
    run = RunFolder(arguments.run)
    with tensorboard(run.path.parent) as served:
        asyncio.run(picture(overview(served, run), arguments.out))
