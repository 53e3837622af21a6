"""What a person at a terminal gets, and a file or a pipe does not: colours, and paths as seen from where one stands."""

from __future__ import annotations

import os
import re
import sys
from typing import Literal, TextIO

Style = Literal["bold", "dim", "red", "green", "yellow"]

_CODES: dict[Style, int] = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33}


def has_colours(stream: TextIO) -> bool:
    """Tells whether to colour what goes there: a terminal that knows how, of somebody who has not set NO_COLOR."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb") and not os.environ.get("NO_COLOR")


def paint(text: str, style: Style, stream: TextIO | None = None) -> str:
    """Returns a text in a style where its stream has colours, else as it is. stream: standard output if None"""
    return f"\033[{_CODES[style]}m{text}\033[0m" if has_colours(stream or sys.stdout) else text


def near(text: str, stream: TextIO | None = None) -> str:
    """Returns a text for a terminal, in which paths below the working folder begin there; for a file as it is.

    stream: standard output if None
    """
    if not (stream or sys.stdout).isatty():
        return text
    try:
        here = os.getcwd()
    except FileNotFoundError:
        return text
    # Not within a URL or another path, nor what would then be an option; behind the end of a style.
    begins = rf"(?:(?<![\w.~:/-])|(?<=\033\[0m)){re.escape(here)}/(?=[\w.])"
    return text if here == "/" else re.sub(begins, "", text)


def labelled(name: str, text: str) -> str:
    """Returns a line of what a program says on standard output before it begins: what it is about, and the text."""
    return (paint(f"{name:<14}", "bold") if name else " " * 14) + text


def complain(what: object) -> None:
    """Says on standard error what is wrong."""
    print(f"{paint('error:', 'red', sys.stderr)} {near(str(what), sys.stderr)}", file=sys.stderr, flush=True)  # noqa: T201
