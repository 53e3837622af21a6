"""How sizes, times, shares, counts and tables are said: in one way by all programs."""

from __future__ import annotations

from collections.abc import Sequence

NONE = "–"
"""What stands for a value that is not known."""


def size(count: float) -> str:
    """Says 12 bytes, 1.5 GB: three digits, in powers of 1,000. count: bytes."""
    if count < 999.5:
        return f"{count:.0f} bytes"
    for unit in ("kB", "MB", "GB", "TB"):
        count /= 1000
        if count < 999.5:
            return f"{count:.3g} {unit}"
    return f"{count / 1000:.3g} PB"


def duration(seconds: float) -> str:
    """Says 4.2 s, 40 s, 3 min 20 s, 2 h 05 min, 3 d 04 h. A negative one, of clocks that differ, is 0 s."""
    if seconds < 9.95:
        return f"{max(round(seconds, 1), 0):g} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24:02d} h"


def share(fraction: float) -> str:
    """Says 38 %, 2.3 %, 0 %: one decimal below ten per cent."""
    percent = 100 * fraction
    return f"{round(percent, 1 if abs(percent) < 9.95 else 0):g} %"


def counted(number: int, what: str, plural: str | None = None) -> str:
    """Says 1 shard, 1,282 shards."""
    return f"{number:,} {what if number == 1 else plural or what + 's'}"


def aligned(rows: Sequence[Sequence[object]]) -> list[str]:
    """Returns rows of cells as lines whose columns stand below each other."""
    cells = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
