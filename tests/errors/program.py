"""Calls a program of the project in this process, as its command line would."""

from __future__ import annotations

import importlib
import importlib.util
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

from crate_dist.prep.program import run_program
from tests.ranks import REPOSITORY

NOBODY = 65534
_FEW_BYTES = 16
_PACKAGES = ("crate_dist.models.weights", "crate_dist.doctor", "crate_dist.config")


def call(program: str, arguments: Sequence[str]) -> int:
    """Returns the exit status of `program`: a path in the clone, or a module."""
    main = load(program)
    before = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = [program, *arguments]
    try:
        if program.startswith("data_prep/"):
            return run_program(main)
        return main(list(arguments)) or 0
    except SystemExit as ended:
        if isinstance(ended.code, str):
            sys.stderr.write(ended.code + "\n")
            return 1
        return ended.code or 0
    finally:
        sys.argv = before[0]
        signal.signal(signal.SIGTERM, before[1])


@cache
def load(program: str) -> Callable[..., Any]:
    if not program.endswith(".py"):
        name = program if program in ("crate_dist.train", "crate_dist.evaluate", "crate_dist.probe") else None
        module = importlib.import_module(name or f"{program}.__main__")
    else:
        spec = importlib.util.spec_from_file_location(Path(program).stem + "_program", REPOSITORY / program)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    main: Callable[..., Any] = module.main
    return main


@contextmanager
def as_nobody() -> Iterator[None]:
    """Takes the rights of root, where there are any, from what is done inside."""
    if os.getuid():
        yield
        return
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@contextmanager
def full_disk() -> Iterator[None]:
    """Lets no file grow beyond a few bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FEW_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


CIRCUMSTANCES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "as_usual": nullcontext,
    "as_nobody": as_nobody,
    "full_disk": full_disk,
}
