"""Keeps a ledger in the run folder of the time that a run took, over all its restarts. Imports no torch.

One JSON object per line: starts, steps, evaluations, white-box measures, saves; up_s is seconds since the start of the
process, by a clock that does not jump. Goodput is the share of the wall time in which the run was up that went into
steps which count: not into waiting for data, evaluating, measuring the white box, standing still for a save, starting,
or steps that a restart had to make a second time. The pauses between an end and the next start, in a queue or over a
weekend, are a figure of their own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crate_dist.files import AppendedFile, mended_lines, whole_lines
from crate_dist.run.lock import ALONE


@dataclass
class LedgerTotals:
    """The sums of the ledger: seconds, and counts."""

    wall_s: float = 0.0
    away_s: float = 0.0
    productive_s: float = 0.0
    redone_s: float = 0.0
    data_wait_s: float = 0.0
    evaluation_s: float = 0.0
    whitebox_s: float = 0.0
    save_stall_s: float = 0.0
    restarts: int = -1
    steps_redone: int = 0
    _spans: list[tuple[int, int, float]] = field(default_factory=list, repr=False)
    _time: float = field(default=0.0, repr=False)
    _up_s: float = field(default=0.0, repr=False)

    @classmethod
    def read(cls, path: Path) -> LedgerTotals:
        """Adds up what a ledger has so far, and changes nothing."""
        totals = cls()
        totals._take_up(whole_lines(path))
        return totals

    @property
    def goodput(self) -> float:
        """Share of the wall time that went into steps which count."""
        return self._share(self.productive_s)

    def lost(self) -> dict[str, float]:
        """Returns the shares of the wall time that went into anything else, the largest first."""
        lost = {
            "waiting for data": self.data_wait_s,
            "evaluation": self.evaluation_s,
            "white-box measures": self.whitebox_s,
            "standing still for saves": self.save_stall_s,
            "steps made twice": self.redone_s,
        }
        lost["starting, and what else there was"] = max(self.wall_s - self.productive_s - sum(lost.values()), 0.0)
        return {name: self._share(lost[name]) for name in sorted(lost, key=lambda name: -lost[name])}

    def add(self, event: dict[str, Any]) -> None:
        """Takes up one line."""
        kind = event["event"]
        if kind == "start":
            self.restarts += 1
            self._forget_after(event["step"])
            # The clock is asked only how long the run was away; it may be another machine's, or be set meanwhile.
            self.away_s += max(event["time"] - event["up_s"] - self._time, 0.0) if self._time else 0.0
            self._up_s = 0.0
        elif kind == "steps":
            self.data_wait_s += event["wait_s"]
            productive = max(event["busy_s"] - event["wait_s"], 0.0)
            self.productive_s += productive
            self._spans.append((event["after"], event["step"], productive))
        elif kind == "evaluation":
            self.evaluation_s += event["seconds"]
        elif kind == "whitebox":
            self.whitebox_s += event["seconds"]
        elif kind == "save":
            self.save_stall_s += event["stall_s"]
        self.wall_s += event["up_s"] - self._up_s
        self._time, self._up_s = event["time"], event["up_s"]

    def _forget_after(self, step: int) -> None:
        """Takes steps behind the checkpoint that a restart begins from as lost: they are made a second time."""
        kept = []
        for first, last, seconds in self._spans:
            lost = max(last - max(first, step), 0)
            lost_s = seconds * lost / max(last - first, 1)
            self.steps_redone += lost
            self.redone_s += lost_s
            self.productive_s -= lost_s
            if first < step:
                kept.append((first, min(last, step), seconds - lost_s))
        self._spans = kept[-1000:]

    def _share(self, seconds: float) -> float:
        return seconds / self.wall_s if self.wall_s else 0.0

    def scalars(self) -> dict[str, float]:
        """Returns the totals by the names of their curves."""
        return {
            "goodput/fraction": self.goodput,
            "goodput/data_wait_fraction": self._share(self.data_wait_s),
            "goodput/evaluation_fraction": self._share(self.evaluation_s),
            "goodput/whitebox_fraction": self._share(self.whitebox_s),
            "goodput/save_stall_fraction": self._share(self.save_stall_s),
            "goodput/away_s": self.away_s,
            "goodput/restarts": float(self.restarts),
            "goodput/steps_redone": float(self.steps_redone),
        }

    def _take_up(self, lines: Iterable[str]) -> None:
        for text in lines:
            try:
                self.add(json.loads(text))
            except (ValueError, KeyError, TypeError):  # of a file system that was repaired, or of an older version
                continue


class Ledger:
    """The ledger's file, which rank 0 writes. up_s: seconds since the process began, until now."""

    def __init__(self, path: Path, up_s: float = 0.0, check: Callable[[], None] = ALONE.check) -> None:
        self.totals = LedgerTotals()
        self._began = time.monotonic() - up_s
        self.totals._take_up(mended_lines(path))
        self._file = AppendedFile(path, check)

    def note(self, event: str, **facts: Any) -> None:
        """Appends one line, at once."""
        up_s = time.monotonic() - self._began
        line = {"event": event, "time": round(time.time(), 3), "up_s": round(up_s, 3), **facts}
        self.totals.add(line)
        self._file.append((json.dumps(line) + "\n").encode())
