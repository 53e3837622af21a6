"""Options of sbatch, as its users write them."""

from __future__ import annotations

import argparse
import math
import re

from crate_dist.config.sections import node_count


def parse_minutes(text: str) -> int:
    """Reads SLURM's notations of a time limit (90, 90:00, 12:00:00, 2-00, …) as minutes, rounded up."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no time limit; 90 (minutes), 12:00:00 or 2-00:00:00 would be")
    days, *parts = match.groups()
    first, second, third = (int(part) if part else 0 for part in parts)
    if days is None and parts[2] is None:  # minutes[:seconds]; all others begin with hours
        return math.ceil(first + second / 60)
    return int(days or 0) * 1440 + first * 60 + math.ceil(second + third / 60)


def parse_nodes(text: str) -> int | str:
    """Reads a number of nodes, or a range of them."""
    try:
        return node_count(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
