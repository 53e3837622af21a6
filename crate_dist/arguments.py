"""Types of command-line options that several programs share, for argparse."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """Gives the type of an option that is a whole number from `low` to `high`, both of them allowed."""
    expected = f"a whole number from {low} " + ("on" if high is None else f"to {high}")

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low or (high is not None and int(text) > high):
            raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
        return int(text)

    return parse


positive = whole_number(1)
"""The type of an option that counts something: a whole number from 1 on."""
