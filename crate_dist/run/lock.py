"""One run folder, one writer: the one that holds the lease of the folder, which everybody else waits for to run out.

    lock/00000041     the newest number; who has made it holds the folder, and the file says who that is

A number is made exclusively, by an operation that the file system's server decides: of all who try to make the same one
a single one succeeds, whatever anybody's cache shows. The holder makes the next number every few seconds, and so
learns that it still is the holder. A start that has seen no new number for longer than the lease makes the next one
itself. Should the holder be alive after all (it was stopped, its storage was out of reach, the start saw an old
listing), then one of the two does not get its number, and ends.

Between the holder's last look and what it does next it can still be stopped for hours. So what it does is harmless:
its tenure, which is the number that it began with, stands in all that it writes, and it deletes nothing of a later one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import platform
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from crate_dist.errors import UserError
from crate_dist.run.exit_status import LOST_THE_RUN

logger = logging.getLogger(__name__)

LEASE_S = 30.0
"""How long a holder may go without making a number before it has to make one, and so be told, before it writes."""
HANDED_OVER = "CRATE_RUN_LOCK"
"""Names the token of a lock that its holder, the launcher of this process, hands over to it."""

_BEATS = 6  # numbers that a holder makes per lease
_PATIENCE = 2.0  # leases without a new number after which a holder is believed to be gone
_KEPT = 64  # numbers that stay, so that a start that sees a listing of minutes ago meets the one it would make
_GLANCE_S = 0.1  # for which a look is good: of hundreds of curves one point each is appended at a time
_ASKING_S = 90.0  # for a holder that will leave by itself: our former self, a launcher
_SPECIAL_STEPS = 0x7FFFFFFF  # of a batch script, an interactive shell: SLURM numbers these from the other end
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)
_OLD_LOCK, _OLD_LEASE_S = "run.lock", 30.0  # until 2026: a file whose modification time was the sign of life


class RunIsLocked(UserError):
    """Another job works in the run folder."""


class LostTheRun(UserError):
    """Another job has taken over the run folder, and nothing may be written there any more."""


def _nothing() -> None:
    """What there is to check where nobody else can be."""


@dataclass(frozen=True)
class Tenure:
    """What who writes into a run folder must know of the lock.

    number: smaller than that of every later holder; token: the holder's own
    check: raises LostTheRun when somebody else has the lock, OSError when that cannot be seen at the moment
    """

    number: int = 0
    token: str = "none"
    check: Callable[[], None] = _nothing


ALONE = Tenure()
"""Where nobody else can be."""


@dataclass(frozen=True)
class Holder:
    """Who has made a number of a lock.

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

    def surely_gone(self) -> bool:
        """Known without waiting: it left, its process on this machine ended, or its srun in this allocation did."""
        if self.free or (self._is_of_this_machine() and self.began != _began(self.pid)):
            return True
        mine = self.job and (self.job, self.restart) == (_slurm("JOB_ID"), _slurm("RESTART_COUNT") or "0")
        return bool(mine) and self._srun_has_ended()

    def surely_alive(self) -> bool:
        """Known without waiting: its process is to be seen on this machine."""
        return not self.free and self._is_of_this_machine() and self.began == _began(self.pid)

    def came_before(self, other: Holder) -> bool:
        """Whether it is `other`'s job before SLURM started that again, believing this one to be dead."""
        return bool(self.job) and self.job == other.job and _count(self.restart) < _count(other.restart)

    def _is_of_this_machine(self) -> bool:
        return bool(self.machine and self.began) and self.machine == _machine()

    def _srun_has_ended(self) -> bool:
        job, restart, ended = ([*os.environ.get("CRATE_ENDED_STEPS", "").split("."), "", ""])[:3]
        if self.start and (job, restart) == (self.job, self.restart) and ended.isdecimal():
            return _count(self.start) <= int(ended)
        counted = _count(self.step or "-") < _SPECIAL_STEPS and self.step.isdecimal()
        return counted and self.step != _slurm("STEP_ID") and _slurm_knows_no_step(self.job, self.step)


class RunLock:
    """Held by rank 0 for as long as the run lasts, and by launchers while they open a folder; `with RunLock(path): …`.

    path: the folder of the numbers; the run folder, in which it lies, is there
    brief: of a launcher, which leaves within seconds: others wait for it
    lost: called in a thread of the lock when somebody else has it; None: the process ends with LOST_THE_RUN

    Raises
    ------
    RunIsLocked: on entry, when the holder is alive
    """

    def __init__(
        self,
        path: Path,
        lease_s: float = LEASE_S,
        brief: bool = False,
        lost: Callable[[str], None] | None = None,
    ) -> None:
        self._path, self._lease_s = path, lease_s
        self._me = replace(_myself(), lease_s=lease_s, brief=brief)
        self._tell = lost or _end_at_once
        self._number = self._tenure = 0
        self._made_at = self._looked_at = 0.0
        self._lost = ""
        self._mutex = threading.RLock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)

    @property
    def tenure(self) -> Tenure:
        """For those who write."""
        return Tenure(self._tenure, self._me.token, self.check)

    def environment(self) -> Mapping[str, str]:
        """The variables that let a process which is started with them take the lock over at once."""
        return {HANDED_OVER: self._me.token}

    def __enter__(self) -> RunLock:
        self._path.mkdir(parents=True, exist_ok=True)
        self._wait_for_an_older_program()
        asked = self._path / f"asked-{self._me.token}"
        try:
            while True:
                number, looked_at = self._wait_for_a_free_number(asked)
                if _now() - looked_at < self._lease_s and self._make(number, self._me):
                    break
        finally:
            asked.unlink(missing_ok=True)
        self._tenure = self._number
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        with self._mutex, contextlib.suppress(OSError):
            self._leave()

    def check(self) -> None:
        """Returns while this is the holder; before whatever changes the run folder.

        Raises
        ------
        LostTheRun: another one is
        OSError: nothing can be seen, and for so long that another one may be
        """
        with self._mutex:
            if self._lost:
                raise LostTheRun(self._lost)
            if _now() - self._made_at > self._lease_s:
                self._renew()
                return
            if _now() - self._looked_at > _GLANCE_S:
                with contextlib.suppress(OSError):  # within the lease nobody else can have become it
                    self._lose_unless_ours()
                self._looked_at = _now()

    def _wait_for_a_free_number(self, asked: Path) -> tuple[int, float]:
        """The number that comes next, once nobody holds the one before, and when it was looked."""
        began = since = _now()
        seen: tuple[int, Holder] | None = None
        while True:
            looked_at = _now()
            number = max(self._numbers(), default=0)
            holder = self._holder(number) if number else Holder("", free=True)
            if holder.surely_gone() or holder.token == os.environ.get(HANDED_OVER):
                break
            leaves = holder.brief or holder.came_before(self._me)
            moved = seen is not None and seen[0] != number
            if _now() - began > _ASKING_S if leaves else moved or holder.surely_alive():
                raise RunIsLocked(
                    f"{self._path.parent} is in use by {holder}; wait for it, cancel it, or give another --run-dir"
                )
            if seen is None:
                patience_s = _PATIENCE * holder.lease_s
                logger.info("%s is held by %s: up to %.0f s to see whether it lives", self._path, holder, patience_s)
                if leaves:
                    asked.write_text(_to_text(self._me))
            if seen is None or moved:
                seen, since = (number, holder), _now()
            elif _now() - since > _PATIENCE * holder.lease_s:
                logger.warning("taking over %s from %s, which gives no sign of life", self._path.parent, holder)
                break
            time.sleep(min(holder.lease_s, self._lease_s) / _BEATS / 4)
        # A folder without numbers may have had some, in a lock that was removed: the clock is ahead of all of them.
        return number + 1 if number else int(1000 * time.time()), looked_at

    def _wait_for_an_older_program(self) -> None:
        """One that knows only the file run.lock, which it touches as long as it lives."""
        old = self._path.with_name(_OLD_LOCK)
        with contextlib.suppress(FileNotFoundError):
            first, began = old.stat().st_mtime_ns, _now()
            logger.info("%s is there; looking for up to %.0f s whether its job lives", old, _PATIENCE * _OLD_LEASE_S)
            while _now() - began < _PATIENCE * _OLD_LEASE_S:
                if old.stat().st_mtime_ns != first:
                    raise RunIsLocked(f"{old.parent} is in use by a job of an older version: {old.read_text()}")
                time.sleep(_OLD_LEASE_S / _BEATS / 4)
            old.unlink()

    def _numbers(self) -> list[int]:
        return [int(name) for name in os.listdir(self._path) if name.isdecimal()]

    def _holder(self, number: int) -> Holder:
        """Who made a number; somebody unknown, if it cannot be read, is believed to live until no number follows."""
        try:
            return _from_text((self._path / f"{number:08d}").read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, KeyError):
            return Holder("")

    def _make(self, number: int, holder: Holder) -> bool:
        """Makes a number, and tells whether it was this process that made it and nobody has made a later one."""
        now, path = _now(), self._path / f"{number:08d}"
        beside = self._path / f".{holder.token}"
        try:
            beside.write_text(_to_text(holder), encoding="utf-8")
            try:
                os.link(beside, path)
            except FileExistsError:  # an NFS server says so, too, when it is asked a second time for what it has done
                if self._holder(number).token != holder.token:
                    return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                try:
                    with path.open("x", encoding="utf-8") as file:
                        file.write(_to_text(holder))
                except FileExistsError:
                    return False
        finally:
            with contextlib.suppress(OSError):
                beside.unlink()
        if max(self._numbers(), default=0) != number:  # it was free because it is so old that it was removed
            return False
        self._number, self._made_at = number, now
        return True

    def _renew(self) -> None:
        """Makes the next number. Raises LostTheRun, or OSError when that is not possible at the moment."""
        self._lose_unless_ours()
        if not self._make(self._number + 1, self._me):
            self._lose()
        for name in os.listdir(self._path):
            if name.isdecimal() and int(name) < self._number - _KEPT:
                (self._path / name).unlink(missing_ok=True)
            elif name.startswith("asked-"):
                self._answer(self._path / name)

    def _answer(self, asked: Path) -> None:
        """Leaves to SLURM's next start of this very job, which waits for nothing else."""
        try:
            other = _from_text(asked.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, KeyError):
            return
        if self._me.came_before(other):
            self._leave()
            self._lost = f"SLURM has started {self._me} again on {other.host}"
            raise LostTheRun(self._lost)

    def _leave(self) -> None:
        """Makes a last number, that says so, and removes those before."""
        if self._lost or not self._make(self._number + 1, replace(self._me, free=True)):
            return
        for number in self._numbers():
            if number < self._number:
                (self._path / f"{number:08d}").unlink(missing_ok=True)

    def _lose_unless_ours(self) -> None:
        try:
            newest = max(self._numbers(), default=0)
        except FileNotFoundError:
            os.listdir(self._path.parent)  # raises OSError when it is not the lock alone that is not there
            newest = 0
        if newest != self._number or self._holder(newest).token not in (self._me.token, ""):  # "": cannot be read now
            self._lose()

    def _lose(self) -> None:
        newest = 0
        with contextlib.suppress(OSError):
            newest = max(self._numbers(), default=0)
        other = self._holder(newest) if newest else None
        self._lost = f"{self._path.parent} has been taken over by {other or 'somebody who removed the lock'}"
        raise LostTheRun(self._lost)

    def _beat(self) -> None:
        failing = False
        while not self._end.wait(self._lease_s / _BEATS):
            try:
                with self._mutex:
                    if not self._lost:
                        self._renew()
                failing = False
            except LostTheRun:
                pass
            except OSError as error:
                if not failing:
                    logger.warning("cannot renew %s: %s", self._path, error)
                failing = True
            if self._lost:
                self._tell(self._lost)
                return


def _end_at_once(why: str) -> None:
    """Not by an exception: the training may be waiting for a rank that is out of reach."""
    logger.critical("%s; this process ends, and leaves the run to it", why)
    logging.shutdown()
    os._exit(LOST_THE_RUN)


def _now() -> float:
    """Seconds, those in which the machine slept among them."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _to_text(holder: Holder) -> str:
    return json.dumps(asdict(holder))


def _from_text(text: str) -> Holder:
    """Raises ValueError or TypeError for what is not a holder's; what a later version adds is passed over."""
    said, nobody = json.loads(text), Holder("")
    kinds: dict[str, Callable[[Any], Any]] = {item.name: type(getattr(nobody, item.name)) for item in fields(Holder)}
    return Holder(**{name: kind(said[name]) for name, kind in kinds.items() if name in said or name == "token"})


def _myself() -> Holder:
    pid = os.getpid()
    return Holder(
        token=uuid.uuid4().hex,
        host=platform.node(),
        pid=pid,
        machine=_machine(),
        began=_began(pid),
        job=_slurm("JOB_ID"),
        restart=_slurm("RESTART_COUNT") or "0",
        start=os.environ.get("CRATE_START", ""),
        step=_slurm("STEP_ID"),
    )


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
    """Nothing, where /proc is that of other processes than those this one can see, or not there."""
    try:
        if int(os.readlink("/proc/self")) != os.getpid():
            return ""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {os.getuid()}"
    except (OSError, ValueError):
        return ""


def _began(pid: int) -> str:
    """When a process of this machine began, in the kernel's ticks; nothing when there is none, or none that lives."""
    try:
        state, *others = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else others[18]
