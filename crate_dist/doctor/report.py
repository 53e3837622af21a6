"""The report of an examination: a JSON file that is always whole, and a text of 100 columns for a bug report."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crate_dist.doctor.machine import without_folders
from crate_dist.doctor.run import Examined, as_json
from crate_dist.doctor.stage import Finding
from crate_dist.files import write_whole

WIDTH = 100
_LABEL = 15
_MARK = {True: "ok", False: "FAILED", None: ""}


def failed_checks(examined: Sequence[Examined]) -> int:
    """Counts the checks that failed."""
    return sum(finding.passed is False for one in examined for finding in one.findings)


def write_json(path: Path, about: Mapping[str, str], examined: Sequence[Examined]) -> None:
    """Writes everything that is known by now. Raises OSError."""
    report: dict[str, Any] = {
        "format": 1,
        "machine": dict(about),
        "failed": failed_checks(examined),
        "stages": [as_json(one) for one in examined],
    }
    write_whole(path, json.dumps(report, indent=1) + "\n")


def as_text(about: Mapping[str, str], examined: Sequence[Examined], where: Path | None) -> str:
    """Returns the report for people. where: the JSON file, None: there is none"""
    lines = [line for name, text in about.items() for line in _labelled(name, text)]
    for one in examined:
        lines += ["", f"{one.stage.name}: {one.state}" + (f", {one.took_s:.0f} s" if one.took_s else "")]
        lines += [line for finding in one.findings for line in _finding(finding)]
    findings = [finding for one in examined for finding in one.findings]
    passed, measured = (sum(finding.passed is kind for finding in findings) for kind in (True, None))
    lines += ["", f"{failed_checks(examined)} checks failed, {passed} passed; {measured} measurements"]
    if where is not None:
        lines += _wrapped(f"numbers: {where.name if where.is_absolute() else where}; logs beside it", "", "  ")
    return "\n".join(lines)


def end_of_log(log: Path, lines: int = 20) -> str:
    """Returns the last lines of a stage's log, below its name."""
    last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
    return "\n".join([f"the end of {log.name}:", *(f"  {without_folders(line)}" for line in last), ""])


class Progress:
    """Tells on stderr what is going on: a line for each stage that begins, and one for each finding."""

    def __init__(self, stages: int) -> None:
        self._stages, self._told, self._begun = stages, dict[str, int](), 0

    def __call__(self, examined: Sequence[Examined]) -> None:
        """Tells what is new."""
        for one in examined:
            if one.stage.name not in self._told and one.state == "running":
                self._begun += 1
                self._say(f"[{self._begun}/{self._stages}] {one.stage.name}, up to {one.limit_s:.0f} s")
            known = self._told.get(one.stage.name, 0)
            if one.state not in ("to do",):
                self._told[one.stage.name] = len(one.findings)
            for finding in one.findings[known:]:
                for line in _finding(finding):
                    self._say(line)

    @staticmethod
    def _say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)  # noqa: T201


def _finding(finding: Finding) -> list[str]:
    """Gives the line of a finding; a second one where it does not fit, and its note below."""
    value = finding.value if isinstance(finding.value, str) else f"{finding.value:.4g}"
    value = f"{value} {finding.unit}".rstrip()
    if finding.expected and finding.passed is not True:
        value += f" (expected: {finding.expected})"
    lines = _wrapped(f"{finding.name}: {value}", f"  {_MARK[finding.passed]:<7}", " " * 11)
    return lines + (_wrapped(finding.note, " " * 11, " " * 11) if finding.note else [])


def _labelled(name: str, text: str) -> list[str]:
    return _wrapped(text, f"{name:<{_LABEL}}", " " * _LABEL)


def _wrapped(text: str, first: str, further: str) -> list[str]:
    wrapper = textwrap.TextWrapper(WIDTH, first, further, break_on_hyphens=False, break_long_words=False)
    return wrapper.wrap(" ".join(text.split())) or [first]
