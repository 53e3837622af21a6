"""One run folder, one job: a second one is refused, and the lock of a dead one is taken over."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from crate_dist.run import write_whole

logger = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
STALE_S = 60.0


class RunIsLocked(RuntimeError):
    """Another job works in the run folder."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    boot, began: of the machine and of the process, so that another process with its id is not believed to be it
    job, restart: SLURM's
    """

    token: str
    host: str
    pid: int
    boot: str
    began: str
    job: str
    restart: str

    def __str__(self) -> str:
        return f"job {self.job} on {self.host}" if self.job else f"process {self.pid} on {self.host}"

    def surely_dead(self) -> bool:
        """Known without waiting: its process on this machine is gone, or it is this job before it was requeued."""
        if self.job and self.job == _job() and self.restart != _restart():
            return True
        return self.host == platform.node() and (self.boot != _boot() or self.began != _began(self.pid))


class RunLock:
    """Held by rank 0 for as long as the run lasts; `with RunLock(path): …`.

    The file names its holder, and a thread touches it every few seconds. Whether it is still touched is seen by
    watching it, so the clocks of two machines need not agree.

    Raises
    ------
    RunIsLocked: on entry, when the holder is alive
    """

    def __init__(self, path: Path, heartbeat_s: float = HEARTBEAT_S, stale_s: float = STALE_S) -> None:
        self._path, self._heartbeat_s, self._stale_s = path, heartbeat_s, stale_s
        self._me = Holder(
            uuid.uuid4().hex, platform.node(), os.getpid(), _boot(), _began(os.getpid()), _job(), _restart()
        )
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)

    def __enter__(self) -> RunLock:
        while not self._create():
            holder = self._holder()
            if holder is not None and not holder.surely_dead() and self._is_touched(holder):
                raise RunIsLocked(
                    f"{self._path.parent} is in use by {holder}; wait for it, cancel it, or give another --run-dir"
                )
            if holder is not None:
                self._remove_lock_of(holder)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        if self._holder() == self._me:
            self._path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Puts the whole file there at once, unless one is there: a link to a file that was written beside."""
        beside = self._path.with_name(f".{self._path.name}.{self._me.token}")
        try:
            write_whole(beside, json.dumps(asdict(self._me)))
            os.link(beside, self._path)
        except FileExistsError:
            return False
        finally:
            beside.unlink(missing_ok=True)
        return True

    def _remove_lock_of(self, dead: Holder) -> None:
        """Takes the file away before looking at it again: another job may just have put its own there."""
        if self._holder() != dead:
            return
        taken = self._path.with_name(f".{self._path.name}.{self._me.token}.taken")
        try:
            self._path.replace(taken)
            if self._holder(taken) == dead:
                logger.warning("taking over the run folder from %s, which is dead", dead)
            else:
                with contextlib.suppress(FileExistsError):
                    os.link(taken, self._path)
        except FileNotFoundError:
            return
        finally:
            taken.unlink(missing_ok=True)

    def _holder(self, path: Path | None = None) -> Holder | None:
        try:
            return Holder(**json.loads((path or self._path).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            return Holder("", "an unknown machine", 0, "", "", "", "")

    def _is_touched(self, holder: Holder) -> bool:
        logger.info(
            "the run folder is locked by %s; looking for up to %.0f s whether it is alive", holder, self._stale_s
        )
        deadline = time.monotonic() + self._stale_s
        first = self._modified()
        while time.monotonic() < deadline:
            time.sleep(self._heartbeat_s / 4)
            if self._modified() != first:
                return self._path.exists()
        return False

    def _modified(self) -> int:
        try:
            return self._path.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def _beat(self) -> None:
        while not self._end.wait(self._heartbeat_s):
            try:
                os.utime(self._path)
            except OSError as error:
                logger.warning("cannot touch %s: %s", self._path, error.strerror)


def _job() -> str:
    return os.environ.get("SLURM_JOB_ID", "")


def _restart() -> str:
    return os.environ.get("SLURM_RESTART_COUNT", "0")


def _began(pid: int) -> str:
    """When a process of this machine began, in the kernel's ticks; nothing when there is none, or none that lives."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
