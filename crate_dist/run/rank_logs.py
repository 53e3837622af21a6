"""Reads the logs of the ranks: what was said, when, and why a run was started again. Imports no torch."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crate_dist.files import lines_backwards, whole_lines
from crate_dist.run.folder import RunFolder

_STAMPED = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) ([WEC]) (.*)")
_SLACK_S = 2.0  # a log's seconds are whole, and the clocks of two nodes not the same
_END = 1 << 16


@dataclass(frozen=True)
class Said:
    """A line of a log; at: seconds since 1970, by the clock of the machine that wrote it."""

    at: float
    text: str


@dataclass(frozen=True)
class Restart:
    """One start of a run after its first. at: seconds since 1970; away_s: since the end of the start before it"""

    step: int
    at: float
    away_s: float
    why: str


def rank_logs(folder: RunFolder) -> list[Path]:
    """Lists the logs of the ranks, that of rank 0 first."""
    return sorted(folder.logs.glob("rank-*.log"))


def said_backwards(log: Path, levels: str, at_most: int) -> Iterator[Said]:
    """Yields the lines of a log that have one of the levels (W, E, C), the last one first.

    at_most: bytes of its end to read
    """
    for line in lines_backwards(log, at_most):
        match = _STAMPED.match(line)
        if match and match[2] in levels:
            with suppress(ValueError):  # no time that there is, of a file system that was repaired
                yield Said(time.mktime(time.strptime(match[1], "%Y-%m-%d %H:%M:%S")), match[3])


def restarts(folder: RunFolder) -> list[Restart]:
    """Returns the restarts of a run, the oldest first, with their reasons: by its ledger, and by what its ranks said.

    Raises OSError when a file is there and cannot be read.
    """
    found, before = list[Restart](), dict[str, Any]()
    began = 0.0
    errors: list[list[Said]] | None = None
    for event in _events(folder.ledger):
        at, is_start = float(event["time"]), event["event"] == "start"
        if is_start and before:
            if errors is None:  # every rank's log, of a run that had none not one
                errors = [list(said_backwards(log, "EC", _END)) for log in rank_logs(folder)]
            last = [next((s for s in of_rank if began <= s.at <= at + _SLACK_S), None) for of_rank in errors]
            # The others report later that they have lost the one that says why.
            first = min(((said.at, rank, said.text) for rank, said in enumerate(last) if said), default=None)
            why = f"rank {first[1]}: {first[2]}" if first else "killed, or its machine was lost"
            why = "told to stop" if before["event"] == "end" else why
            away_s = max(at - float(event.get("up_s", 0.0)) - float(before["time"]), 0.0)
            found.append(Restart(int(event["step"]), at, away_s, why))
        if is_start:
            began = at
        before = event
    return found


def _events(ledger: Path) -> Iterator[dict[str, Any]]:
    for text in whole_lines(ledger):
        try:
            event = json.loads(text)
            if event["event"] != "start" or int(event["step"]) >= 0:
                float(event["time"])
                yield event
        except (ValueError, KeyError, TypeError):  # of a file system that was repaired
            continue
