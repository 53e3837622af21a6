"""The log of a rank: a file of its own, and for rank 0 the terminal too."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm

from crate_dist.run.folder import RunFolder
from crate_dist.world import World


def start_logging(folder: RunFolder, world: World) -> None:
    """Sends this rank's log to its file, and rank 0's to the terminal too, beside the progress bar."""
    folder.logs.mkdir(exist_ok=True)  # a copy of a run may have lost a folder that was empty
    handlers: list[logging.Handler] = [logging.FileHandler(folder.log_file(world.rank), encoding="utf-8")]
    if world.is_main:
        handlers.append(_BesideTheBar())
    form = logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%Y-%m-%d %H:%M:%S")
    root = logging.getLogger()
    for handler in handlers:
        handler.setFormatter(form)
    root.handlers = handlers
    root.setLevel(logging.INFO)


class _BesideTheBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno > logging.INFO or not sys.stderr.isatty() or not record.getMessage().startswith("step "):
            tqdm.write(self.format(record), file=sys.stderr)  # with a bar in sight its postfix says the steps
