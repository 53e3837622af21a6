"""The log of a rank: a file of its own, and for rank 0 the terminal too."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import suppress

from tqdm import tqdm

from crate_dist.errors import UserError
from crate_dist.run.folder import RunFolder
from crate_dist.terminal import near, paint
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
    """Writes as into the file where a file, or a job's log, is what standard error is; for a person otherwise.

    A terminal that has gone away, or a disk that is full for a while, is no reason to end a training.
    """

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ValueError):
            self._write(record)

    def _write(self, record: logging.LogRecord) -> None:
        if not sys.stderr.isatty():
            tqdm.write(self.format(record), file=sys.stderr)
        elif record.levelno > logging.INFO or not record.getMessage().startswith("step "):  # which the bar says
            tqdm.write(_for_a_person(record), file=sys.stderr)


def _for_a_person(record: logging.LogRecord) -> str:
    at = time.strftime("%H:%M:%S", time.localtime(record.created))
    text = near(record.getMessage(), sys.stderr)
    if record.exc_info:
        text += "\n" + logging.Formatter().formatException(record.exc_info)
    if record.levelno >= logging.WARNING:
        is_error = record.levelno >= logging.ERROR
        text = f"{paint('error:' if is_error else 'warning:', 'red' if is_error else 'yellow', sys.stderr)} {text}"
    return f"{paint(at, 'dim', sys.stderr)} {text}"
