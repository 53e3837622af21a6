"""run.json, the record of a run: its code, its starts, the weights it began from, changes of its data. No torch."""

from __future__ import annotations

import datetime
import json
import platform
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from crate_dist.files import write_whole
from crate_dist.run.lock import ALONE
from crate_dist.run.snapshot import CLONE, code_facts

_VERSIONED = ("crate-dist", "torch", "deepspeed", "webdataset", "lion-pytorch", "numpy", "pillow")


@dataclass(frozen=True)
class Record:
    """The record of one run; rank 0 and launchers write it."""

    path: Path

    def begin(self) -> None:
        """Writes the version of the code, unless the run has a record."""
        if not self.path.exists():
            self._write({"code": code_version(), "starts": []})

    def note_origin(self, origin: Mapping[str, Any]) -> None:
        """Puts down which weights the run began from."""
        self._write({**self._read(), "began_from": origin})

    def note_asked(self, options: Sequence[tuple[str, str]]) -> None:
        """Puts down the options, each with its value, by which the run's newest job was asked for."""
        self._write({**self._read(), "asked": [*map(list, options)]})

    def asked(self) -> list[tuple[str, str]]:
        """Returns what note_asked has put down."""
        found: list[list[str]] = self._read().get("asked", []) if self.path.exists() else []
        return [(str(option), str(value)) for option, value in found]

    def run_id(self) -> str | None:
        """Returns the name by which the run's mirror knows it; None for a run that never had one."""
        value = self._read().get("id") if self.path.exists() else None
        return str(value) if value else None

    def note_run_id(self, run_id: str, instead: bool = False) -> None:
        """Puts down the run's id. instead: it takes the place, in a mirror, of the run that was there before."""
        record = {key: value for key, value in self._read().items() if key != "started_over"}
        self._write({**record, "id": run_id, **({"started_over": True} if instead else {})})

    def was_started_over(self) -> bool:
        """Tells whether the run is to take the place of another one in its mirror, and has not yet."""
        return self.path.exists() and bool(self._read().get("started_over"))

    def note_changed_data(self, step: int, digest: str, changes: Mapping[str, str]) -> None:
        """Puts down that the run went on from a step with other data, of which `digest` is known, and what changed."""
        note = {"step": step, "digest": digest, "changes": dict(changes)}
        self._write({**self._read(), "changed_data": [*self.changed_data(), note]})

    def changed_data(self) -> list[dict[str, Any]]:
        """Returns what note_changed_data has put down, the oldest first."""
        notes: list[dict[str, Any]] = self._read().get("changed_data", []) if self.path.exists() else []
        return notes

    def data_was_accepted(self, step: int, digest: str) -> bool:
        """Tells whether these data were put down before for this step: that start died before its first save."""
        return any((note["step"], note["digest"]) == (step, digest) for note in self.changed_data())

    def note_start(self, check: Callable[[], None] = ALONE.check, **facts: Any) -> int:
        """Puts down this start (time, host, code, and `facts`); returns how many there were before it.

        check: called before it is written; raises LostTheRun when the lock is another's
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = self._read()
        record["starts"].append({"time": now, "host": platform.node(), **code_facts(CLONE), **facts})
        check()
        self._write(record)
        return len(record["starts"]) - 1

    def code(self) -> dict[str, Any]:
        """Returns the version of the code that the run began with; see code_version."""
        code: dict[str, Any] = self._read().get("code", {})
        return code

    def starts(self) -> list[dict[str, Any]]:
        """Returns what note_start has put down, the first start first."""
        starts: list[dict[str, Any]] = self._read()["starts"] if self.path.exists() else []
        return starts

    def snapshots(self) -> set[str]:
        """Returns the digests of the code that the starts ran, as far as they are known."""
        return {start["snapshot"] for start in self.starts() if "snapshot" in start}

    def changed_code(self) -> str:
        """Says how the code of the newest start differs from that of the one before it; "": not at all."""
        before, now = [{}, {}, *self.starts()][-2:]
        same = [key for key in ("snapshot", "commit") if before.get(key) and now.get(key)]
        if not same or before[same[0]] == now[same[0]]:
            return ""
        return f"{_short(before)} -> {_short(now)}"

    def _read(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return record

    def _write(self, record: Mapping[str, Any]) -> None:
        write_whole(self.path, json.dumps(record, indent=1))


def new_run_id() -> str:
    """Returns an id for a run: 16 random hexadecimal digits."""
    return secrets.token_hex(8)


def code_version() -> dict[str, Any]:
    """Returns the git commit of the code (None outside a checkout), whether it was changed since, package versions."""
    versions = {}
    for package in _VERSIONED:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {**code_facts(CLONE), "python": platform.python_version(), "packages": versions}


def _short(start: Mapping[str, Any]) -> str:
    """Names the code of a start: its commit, and the snapshot where that alone does not tell."""
    commit, snapshot = start.get("commit"), start.get("snapshot", "")[:10]
    if not commit:
        return f"snapshot {snapshot}"
    return f"commit {commit[:10]}" + (f" with changes, snapshot {snapshot}" if start.get("changed") else "")
