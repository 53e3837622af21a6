"""The lock of a run folder, which has one writer: the holder of a lease, which all others wait for to run out.

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
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from crate_dist.errors import UserError
from crate_dist.run.exit_status import LOST_THE_RUN
from crate_dist.run.holder import LEASE_S, Holder

logger = logging.getLogger(__name__)

HANDED_OVER = "CRATE_RUN_LOCK"
"""Variable with the token of a lock that its holder, the launcher of this process, hands over to it."""

_BEATS = 6  # numbers that a holder makes per lease
_PATIENCE = 2.0  # leases without a new number after which a holder is believed to be gone
_KEPT = 64  # numbers that stay, so that a start that sees a listing of minutes ago meets the one it would make
_GLANCE_S = 0.1  # for which a look is good: of hundreds of curves one point each is appended at a time
_ASKING_S = 90.0  # for a holder that will leave by itself: our former self, a launcher
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)
_OLD_LOCK, _OLD_LEASE_S = "run.lock", 30.0  # until 2026: a file whose modification time was the sign of life


class RunIsLocked(UserError):
    """Another job works in the run folder."""


class LostTheRun(UserError):
    """Another job has taken over the run folder, and nothing may be written there any more."""


def _nothing() -> None:
    """Checks nothing, where nobody else can be."""


@dataclass(frozen=True)
class Tenure:
    """The holder's time in a run folder, as those who write there know it.

    number: smaller than that of every later holder; token: the holder's own
    check: raises LostTheRun when somebody else has the lock, OSError when that cannot be seen at the moment
    """

    number: int = 0
    token: str = "none"
    check: Callable[[], None] = _nothing


ALONE = Tenure()
"""The tenure where nobody else can be."""


class RunLock:
    """The lock that rank 0 holds while the run lasts, and a launcher while it opens a folder; `with RunLock(path): …`.

    path: the folder of the numbers; the run folder, in which it lies, is there
    brief: of a launcher, which leaves within seconds: others wait for it
    lost: called in a thread of the lock when somebody else has it; None: the process ends with LOST_THE_RUN

    Raises RunIsLocked: on entry, when the holder is alive.
    """

    def __init__(
        self,
        path: Path,
        lease_s: float = LEASE_S,
        brief: bool = False,
        lost: Callable[[str], None] | None = None,
    ) -> None:
        self._path, self._lease_s = path, lease_s
        self._me = replace(Holder.of_this_process(), lease_s=lease_s, brief=brief)
        self._tell = lost or _end_at_once
        self._number = self._tenure = 0
        self._made_at = self._looked_at = 0.0
        self._lost = ""
        self._mutex = threading.RLock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)

    @property
    def tenure(self) -> Tenure:
        """The tenure, for those who write."""
        return Tenure(self._tenure, self._me.token, self.check)

    def environment(self) -> Mapping[str, str]:
        """Returns the variables with which a process takes the lock over at once."""
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
        """Returns the number that comes next, once nobody holds the one before, and the time of that look."""
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
                    asked.write_text(self._me.to_text())
            if seen is None or moved:
                seen, since = (number, holder), _now()
            elif _now() - since > _PATIENCE * holder.lease_s:
                logger.warning("taking over %s from %s, which gives no sign of life", self._path.parent, holder)
                break
            time.sleep(min(holder.lease_s, self._lease_s) / _BEATS / 4)
        # A folder without numbers may have had some, in a lock that was removed: the clock is ahead of all of them.
        return number + 1 if number else int(1000 * time.time()), looked_at

    def _wait_for_an_older_program(self) -> None:
        """Waits for one that knows only the file run.lock, which it touches as long as it lives."""
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
        """Reads who made a number; whom it cannot read is believed to live until no number follows."""
        try:
            return Holder.from_text((self._path / f"{number:08d}").read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, KeyError):
            return Holder("")

    def _make(self, number: int, holder: Holder) -> bool:
        """Makes a number, and tells whether it was this process that made it and nobody has made a later one."""
        now, path = _now(), self._path / f"{number:08d}"
        beside = self._path / f".{holder.token}"
        try:
            beside.write_text(holder.to_text(), encoding="utf-8")
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
                        file.write(holder.to_text())
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
            other = Holder.from_text(asked.read_text(encoding="utf-8"))
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


def holder_of(path: Path) -> Holder | None:
    """Returns who made a lock's newest number; None where there is no lock, or its number cannot be read."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        numbers = [name for name in os.listdir(path) if name.isdecimal()]
        return Holder.from_text((path / max(numbers, key=int)).read_text(encoding="utf-8")) if numbers else None
    return None


def _end_at_once(why: str) -> None:
    """Ends the process, not by an exception: the training may be waiting for a rank that is out of reach."""
    logger.critical("%s; this process ends, and leaves the run to it", why)
    logging.shutdown()
    os._exit(LOST_THE_RUN)


def _now() -> float:
    """Returns seconds, those in which the machine slept among them."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
