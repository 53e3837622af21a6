"""The holder of a run folder's lock, and by what a start knows that it lives or is dead. Imports no torch."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

LEASE_S = 30.0
"""Seconds that a holder may go without making a number; then it makes one, and so is told, before it writes."""

_SPECIAL_STEPS = 0x7FFFFFFF  # of a batch script, an interactive shell: SLURM numbers these from the other end


@dataclass(frozen=True)
class Holder:
    """The process that has made a number of a lock.

    machine: the running kernel, the process namespace and the user, within which `pid` and `began` name a process; none
    where that cannot be told
    job, restart, start, step: SLURM's, and which srun of its batch script it is
    brief: it leaves by itself within seconds, as a launcher does; free: it has left
    """

    token: str
    host: str = "an unknown machine"
    pid: int = 0
    machine: str = ""
    began: str = ""
    job: str = ""
    restart: str = "0"
    start: str = ""
    step: str = ""
    lease_s: float = LEASE_S
    brief: bool = False
    free: bool = False

    def __str__(self) -> str:
        return f"job {self.job} on {self.host}" if self.job else f"process {self.pid} on {self.host}"

    @classmethod
    def of_this_process(cls) -> Holder:
        """Returns this process as a holder, with a token of its own."""
        return cls(
            token=uuid.uuid4().hex,
            host=platform.node(),
            pid=os.getpid(),
            machine=_machine(),
            began=_began(os.getpid()),
            job=_slurm("JOB_ID"),
            restart=_slurm("RESTART_COUNT") or "0",
            start=os.environ.get("CRATE_START", ""),
            step=_slurm("STEP_ID"),
        )

    @classmethod
    def from_text(cls, text: str) -> Holder:
        """Reads what to_text has written; what a later version adds is passed over.

        Raises ValueError, TypeError or KeyError for what is not a holder's.
        """
        said, nobody = json.loads(text), cls("")
        kinds: dict[str, Callable[[Any], Any]] = {item.name: type(getattr(nobody, item.name)) for item in fields(cls)}
        return cls(**{name: kind(said[name]) for name, kind in kinds.items() if name in said or name == "token"})

    def to_text(self) -> str:
        """Returns what a number's file says of its holder."""
        return json.dumps(asdict(self))

    def surely_gone(self) -> bool:
        """Tells without waiting that it left, its process on this machine ended, or its srun in this allocation did."""
        if self.free or (self._is_of_this_machine() and self.began != _began(self.pid)):
            return True
        mine = self.job and (self.job, self.restart) == (_slurm("JOB_ID"), _slurm("RESTART_COUNT") or "0")
        return bool(mine) and self._srun_has_ended()

    def surely_alive(self) -> bool:
        """Tells without waiting that its process is to be seen on this machine."""
        return not self.free and self._is_of_this_machine() and self.began == _began(self.pid)

    def came_before(self, other: Holder) -> bool:
        """Tells whether it is `other`'s job before SLURM started that again, believing this one to be dead."""
        return bool(self.job) and self.job == other.job and _count(self.restart) < _count(other.restart)

    def _is_of_this_machine(self) -> bool:
        return bool(self.machine and self.began) and self.machine == _machine()

    def _srun_has_ended(self) -> bool:
        job, restart, ended = ([*os.environ.get("CRATE_ENDED_STEPS", "").split("."), "", ""])[:3]
        if self.start and (job, restart) == (self.job, self.restart) and ended.isdecimal():
            return _count(self.start) <= int(ended)
        counted = _count(self.step or "-") < _SPECIAL_STEPS and self.step.isdecimal()
        return counted and self.step != _slurm("STEP_ID") and _slurm_knows_no_step(self.job, self.step)


def newest_holder(lock: Path) -> tuple[Holder, float] | None:
    """Reads who made the newest number of a lock, and when by the file server's clock; None where nobody has.

    Raises OSError when that cannot be seen.
    """
    try:
        newest = max((name for name in os.listdir(lock) if name.isdecimal()), key=int, default=None)
        if newest is None:
            return None
        with (lock / newest).open(encoding="utf-8") as file:
            return Holder.from_text(file.read()), os.fstat(file.fileno()).st_mtime
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def _slurm(name: str) -> str:
    return os.environ.get(f"SLURM_{name}", "")


def _count(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def _slurm_knows_no_step(job: str, step: str) -> bool:
    try:
        done = subprocess.run(["scontrol", "show", "step", f"{job}.{step}"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode != 0 and "not found" in (done.stdout + done.stderr).lower()


def _machine() -> str:
    """Names kernel, process namespace and user; nothing where /proc is not there, or shows other processes."""
    try:
        if int(os.readlink("/proc/self")) != os.getpid():
            return ""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {os.getuid()}"
    except (OSError, ValueError):
        return ""


def _began(pid: int) -> str:
    """Returns when a process began, in the kernel's ticks; nothing when there is none, or none that lives."""
    try:
        state, *others = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else others[18]
