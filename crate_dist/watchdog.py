"""A rank that does not arrive ends the job, with every rank's stack in its log.

Without it the others would wait for half an hour in a collective and say nothing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import threading
import time
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from crate_dist.distributed import World

logger = logging.getLogger(__name__)

TRY_AGAIN = 75
"""Exit status (EX_TEMPFAIL) of a rank that is not done, and for which nobody need do anything but start it again."""
_LOOK_EVERY_S = 1.0


class Watchdog:
    """Ends this process when `beat` was not called for `timeout_s` seconds.

    Each rank tells the others where it is through the process group's store, so that the log can name the ones that
    are behind. A process that is stopped altogether cannot end itself; the others end, and the launcher ends it.
    """

    def __init__(self, world: World, timeout_s: float, log_file: Path) -> None:
        self._world, self._timeout_s, self._log_file = world, timeout_s, log_file
        self._beats = 0
        self._what = "starting"
        self._last = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join(timeout=2 * _LOOK_EVERY_S)

    def beat(self, what: str) -> None:
        """Progress was made; `what` this rank does next, for the log."""
        self._beats += 1
        self._what, self._last = what, time.monotonic()

    def _watch(self) -> None:
        store = dist.distributed_c10d._get_default_store()
        told = -1
        while not self._end.wait(_LOOK_EVERY_S):
            if self._beats != told:
                told = self._beats
                with contextlib.suppress(RuntimeError):  # the store is rank 0's, which may be gone
                    store.set(f"watchdog/{self._world.rank}", f"{told} {self._what}")
            if time.monotonic() - self._last > self._timeout_s:
                self._give_up(store)

    def _give_up(self, store: dist.Store) -> None:
        # A store whose rank is stopped would keep us: this thread must end the process in any case.
        threading.Timer(10.0, os._exit, args=(TRY_AGAIN,)).start()
        logger.critical("no progress for %.0f s while %s; every thread's stack follows", self._timeout_s, self._what)
        with self._log_file.open("a", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        with contextlib.suppress(RuntimeError):
            logger.critical("%s", self._who_is_behind(store))
        os._exit(TRY_AGAIN)

    def _who_is_behind(self, store: dist.Store) -> str:
        places = []
        for rank in range(self._world.world_size):
            text = store.get(f"watchdog/{rank}").decode() if store.check([f"watchdog/{rank}"]) else "0 starting"
            beats, _, what = text.partition(" ")
            places.append((int(beats), rank, what))
        least = min(places)[0]
        behind = [f"rank {rank} ({what})" for beats, rank, what in places if beats == least]
        if len(behind) == self._world.world_size:
            return "all ranks are at the same place"
        return f"behind the others: {', '.join(behind)}"
