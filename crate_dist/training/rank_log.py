"""The log of a rank: a file of its own, and for rank 0 the terminal too."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm

from crate_dist.errors import UserError
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


def log_to_file(error: Exception) -> None:
    """Writes what ends this rank into its log alone: the program itself says it on the terminal."""
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    record = logging.LogRecord(__name__, logging.ERROR, __file__, 0, text, None, None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


class _BesideTheBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno > logging.INFO or not sys.stderr.isatty() or not record.getMessage().startswith("step "):
            tqdm.write(self.format(record), file=sys.stderr)  # with a bar in sight its postfix says the steps
