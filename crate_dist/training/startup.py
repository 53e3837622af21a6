"""Times the way from the start of the process to the first step, part by part, for one line in the log."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

logger = logging.getLogger(__name__)


class Startup:
    """A stopwatch that began with the process, before Python ran a line of this program."""

    def __init__(self) -> None:
        self._began = _process_began()
        self._last = self._began
        self._parts: list[tuple[str, float]] = []
        self.over = False

    def mark(self, what: str, of_it: tuple[str, float] | None = None) -> None:
        """Ends the part `what`, which began where the one before ended. of_it: a name, and seconds of it, set apart."""
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        taken = now - self._last
        if of_it is not None:
            self._parts.append(of_it)
            taken -= of_it[1]
        self._parts.append((what, taken))
        self._last = now

    def report(self) -> None:
        """Logs all parts, once."""
        if not self.over:
            self.over = True
            parts = ", ".join(f"{what} {seconds:.1f}" for what, seconds in self._parts)
            logger.info("first step %.1f s after the start of the process: %s", self._last - self._began, parts)


def up_s() -> float:
    """Returns the seconds since this process began."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - _process_began()


def _process_began() -> float:
    """Reads from /proc (field 22 of stat, in ticks) when this process began: seconds on the clock since boot."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
