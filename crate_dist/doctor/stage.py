"""What a stage of the examination is given, and the findings that it yields.

A stage is a module of this room with a generator `examine(setting: Setting) -> Iterator[Finding]`. It runs in a process
of its own, and yields each finding as soon as it has it: what was found before a crash or a time limit is kept.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SMALL_NOTE = "small sizes, on a CPU: means nothing for a GPU"


@dataclass(frozen=True)
class Finding:
    """A line of the report.

    name: what was looked at, "gradients, bf16, compiled"
    value: what was seen, a number in `unit` or a short text
    expected: what would be well, for people: "at most 0.02"; "" for a measurement, which asserts nothing
    passed: whether it is well; None: a measurement, or a check that cannot be made here
    note: a sentence more: why it failed, what would do, or why it was left out
    facts: further numbers, for the JSON alone
    """

    name: str
    value: float | str
    unit: str = ""
    expected: str = ""
    passed: bool | None = None
    note: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """Where and how large a stage is to be.

    device: "cuda" or "cpu"
    small: sizes that a CPU computes within seconds, instead of those that fill a GPU
    scratch: an empty folder of this stage's own
    ends_at: time.monotonic() at which the stage is ended from outside
    reference: a checkout of the published code to compare with; None: there is none
    """

    device: str
    small: bool
    scratch: Path
    ends_at: float
    reference: Path | None = None

    def left_out(self, name: str, what_for: str = "") -> Finding:
        """Returns the finding of what this stage has had no time for: nothing wrong was seen."""
        note = "its time was over; --only with this stage alone, or a larger --budget, gives it more"
        return Finding(name, "left out", note=f"{what_for}: {note}" if what_for else note)

    @property
    def left_s(self) -> float:
        """The seconds that are left to this stage."""
        return self.ends_at - time.monotonic()
