"""Opens TensorBoard in a headless Chromium: for a test, and for the picture of docs/dashboard.md.

    python -m tests.browser runs/demo docs/pictures/dashboard.png

The runs beside the named one are shown too. TensorBoard runs in this process, at a port that is free.
"""

from __future__ import annotations

import html
import logging
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crate_dist.run.dashboard import address
from crate_dist.run.folder import RunFolder

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1600,1000"),
    "--virtual-time-budget=15000",
)
_WAIT_S = 60.0


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
    bare = re.sub(r"<(style|script)\b.*?</\1>|<[^>]+>", " ", _chromium("--dump-dom", url), flags=re.DOTALL)
    return " ".join(html.unescape(bare).split())


def picture(url: str, out: Path) -> None:
    """Writes what a browser shows of a page, 1600 x 1000 pixels."""
    _chromium(f"--screenshot={out.absolute()}", url)


def _chromium(*arguments: str) -> str:
    assert CHROMIUM, "there is no Chromium"
    line = [CHROMIUM, *_OPTIONS, *arguments]
    return subprocess.run(line, check=True, capture_output=True, text=True, timeout=_WAIT_S).stdout


if __name__ == "__main__":
    run = RunFolder(Path(sys.argv[1]))
    with tensorboard(run.path.parent) as served:
        picture(overview(served, run), Path(sys.argv[2]))
