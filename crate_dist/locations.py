"""Locations of data, folders and URLs: those that could run a command, and as much of one as may be shown.

A location that could run a command is the user's to give, on the command line or in the environment, and never a
recipe file's (docs/security.md). Such a one, and one that holds a secret, is written to no file.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

_HIDDEN = "…"
_SPOKEN_HERE = ("http", "https", "s3", "gs")
"""Schemes that data/remote/fetch.py reads without a shell, whatever stands behind them."""
_LEAST_SECRET = 4
"""Characters; what is shorter, such as `-H` or `cat`, is not looked for in other texts."""


def location(text: str | Path) -> Path | str:
    """Returns a folder as a path; a URL (https://, s3://, gs://, pipe: and what else webdataset opens) as text."""
    if isinstance(text, str) and text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return text if isinstance(text, str) and re.match(r"pipe:|[a-z][a-z0-9+.-]*://", text) else Path(text)


def may_run_a_command(place: Path | str) -> bool:
    """Tells whether opening it could run a command of its own making: true of all URLs but those that are read here."""
    return isinstance(place, str) and place.partition("://")[0] not in _SPOKEN_HERE


def is_private(place: Path | str) -> bool:
    """Tells whether no file may have it: it is a command, or has a user's name, a query or a fragment in it."""
    return may_run_a_command(place) or redacted(place) != str(place)


def redacted(place: Path | str) -> str:
    """Returns it for people, on one line: without user and password, query and fragment; of a command, its name."""
    if isinstance(place, Path):
        return str(place)
    place = re.sub(r"[\x00-\x1f\x7f]", _HIDDEN, place)
    if place.startswith("pipe:"):
        words = place.removeprefix("pipe:").split(maxsplit=1)
        if not words or not re.fullmatch(r"[\w./+-]+", words[0]):  # `TOKEN=… curl`, say
            return f"pipe:{_HIDDEN}"
        return f"pipe:{words[0]}{f' {_HIDDEN}' if words[1:] else ''}"
    scheme, separator, rest = place.partition("://")
    shown = re.split(r"[?#]", rest, maxsplit=1)[0]
    if "@" in rest[len(shown) :] and "@" not in shown:  # a query, or a password with `?` in it: nobody can tell
        return f"{scheme}{separator}{_HIDDEN}"
    behind = f"?{_HIDDEN}" if shown != rest else ""
    before, at, shown = shown.rpartition("@")
    return f"{scheme}{separator}{_HIDDEN if before else ''}{at}{shown}{behind}"


def scrubbed(text: str, place: Path | str) -> str:
    """Returns a text, such as a command's complaint, without the words of a location that `redacted` keeps back."""
    kept = set(re.findall(r"[\w%.+-]+", redacted(place)))
    words = set(re.findall(r"[\w%.+-]+", f"{place} {unquote(str(place))}"))
    for word in sorted(words - kept, key=len, reverse=True):
        if len(word) >= _LEAST_SECRET:
            text = text.replace(word, _HIDDEN)
    return text


def name_above(place: Path | str) -> str:
    """Returns the name of the folder that holds the folder of a split, as far as it may be shown; "" of a command."""
    if isinstance(place, str) and place.startswith("pipe:"):
        return ""
    return Path(redacted(place).removesuffix(f"?{_HIDDEN}").removesuffix("{}")).parent.name
