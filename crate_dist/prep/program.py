"""The talk of the data_prep programs with a person: options, output, errors, progress."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from crate_dist.arguments import Parser, positive
from crate_dist.data.index import ShardError
from crate_dist.errors import UserError
from crate_dist.files import FULL
from crate_dist.terminal import complain, near, paint

INTERRUPTED = 130


def program_parser(description: str | None, epilog: str) -> Parser:
    """Returns a parser with --workers that shows both texts as they are written, the epilog's examples first."""
    rest, _, example = epilog.partition("\nexample:\n")
    parser = Parser(description=f"{description}\n\nexample:\n{example.rstrip()}\n{rest.rstrip()}")
    parser.add_argument(
        "--workers", type=positive, default=available_cpus(), metavar="N", help="processes at work [one per CPU]"
    )
    return parser


def run_program(main: Callable[[], int | None]) -> int:
    """Runs a program's main and turns what goes wrong into a line on stderr. Returns the exit status.

    Main's own or 0, 1 for an error that the user can mend, 130 after Ctrl-C or SIGTERM; a bug keeps its traceback.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's warning: end as cleanly as on Ctrl-C
    try:
        return main() or 0
    except (UserError, OSError) as error:
        complain(error)
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept, the same command continues", file=sys.stderr)  # noqa: T201
        return INTERRUPTED
    return 1


@contextmanager
def explained(failure: str, remedy: str = "make room, then the same command continues") -> Iterator[None]:
    """Turns an OSError of the block into a ShardError. failure: like "cannot write FILE"; remedy: of a full disk"""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in FULL:
            reason = f"{FULL[error.errno]}; {remedy}"
        elif error.errno in (errno.EACCES, errno.EROFS) and failure.startswith("cannot write"):
            reason += "; give --out a folder that you may write to"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason += "; give a folder that you may write to"
        raise ShardError(f"{failure}: {reason}") from error


def tell(text: str) -> None:
    """Prints a line of the program's result."""
    tqdm.write(near(text), file=sys.stdout)


def warn(text: str) -> None:
    """Prints a line that the user should see and that is no error."""
    tqdm.write(f"{paint('note:', 'yellow', sys.stderr)} {near(text, sys.stderr)}", file=sys.stderr)


def progress_bar(what: str, total: int, unit: str) -> tqdm[Any]:
    """Returns a bar with rate and time left; a line every ten seconds where stderr is a file. unit: " images", "B"."""
    interval = 0.1 if sys.stderr.isatty() else 10
    return tqdm(
        desc=what,
        total=total,
        unit=unit,
        unit_scale=unit == "B",
        mininterval=interval,
        smoothing=0.05,
        dynamic_ncols=True,
    )


def available_cpus() -> int:
    """Returns the number of CPUs that this process may use, on a cluster fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def proper_fraction(text: str) -> float:
    """Reads an option between 0 and 1, neither of them allowed; a type for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number between 0 and 1, for instance 0.05")
    return value
