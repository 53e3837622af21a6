"""Ends the job when a rank does not arrive, with every rank's stack in its log.

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

from crate_dist.run.exit_status import TRY_AGAIN
from crate_dist.training.flight_records import keep_flight_records
from crate_dist.training.interrupt import Interrupt
from crate_dist.world import World

logger = logging.getLogger(__name__)

COMPILING = 4.0
"""Times safety.hang_timeout_s: the patience with compilers, and with libraries at their first call."""
_LOOK_EVERY_S = 1.0
_ANSWER_S = 8.0
_GIVEN_UP = "watchdog/given up"
_TOLD = "watchdog/told to stop"


class Watchdog:
    """Ends this process when `beat` was not called for `timeout_s` seconds, times the patience of the last call.

    Each rank tells the others where it is through the process group's store, so that the log can name the ones that
    are behind, and the first to give up tells the others, so that each leaves its stacks. The store is rank 0's: a
    thread of its own asks it, since it may never answer. A process that is stopped altogether cannot end itself; the
    others end, and the launcher ends it. The thread also carries the news that a rank was told to stop.
    """

    def __init__(self, world: World, timeout_s: float, log_file: Path, interrupt: Interrupt | None = None) -> None:
        self._world, self._timeout_s, self._log_file, self._interrupt = world, timeout_s, log_file, interrupt
        self._beats = 0
        self._what = "starting"
        self._last = time.monotonic()
        self._patience = 1.0
        self._given_up_elsewhere = False
        self._end = threading.Event()
        self._store: dist.Store | None = None
        self._threads = [
            threading.Thread(target=self._watch, name="watchdog", daemon=True),
            threading.Thread(target=self._tell, name="watchdog's store", daemon=True),
        ]

    def __enter__(self) -> Watchdog:
        self._last = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(timeout=2 * _LOOK_EVERY_S)

    def beat(self, what: str, patience: float = 1.0) -> None:
        """Notes progress. what: this rank does next, for the log; patience: how many times timeout_s that may take."""
        self._beats += 1
        self._what, self._last, self._patience = what, time.monotonic(), patience

    def _watch(self) -> None:
        while not self._end.wait(_LOOK_EVERY_S):
            if self._given_up_elsewhere or time.monotonic() - self._last > self._patience * self._timeout_s:
                self._give_up()

    def _connect(self) -> dist.Store:
        """Opens a connection of our own: the process group's is kept busy by whoever waits for another rank on it."""
        return dist.TCPStore(self._world.master_addr, self._world.master_port, wait_for_workers=False)

    def _tell(self) -> None:
        signs_of_life = 0
        with contextlib.suppress(RuntimeError):  # the store's rank is gone, and so will this one be soon
            self._store = self._connect()
            while not self._end.wait(_LOOK_EVERY_S):
                signs_of_life += 1
                self._store.set(f"watchdog/{self._world.rank}", f"{self._beats} {signs_of_life} {self._what}")
                self._given_up_elsewhere = self._store.check([_GIVEN_UP])
                if self._interrupt is not None:
                    if self._interrupt.came():
                        self._store.set(_TOLD, "")
                    self._interrupt.elsewhere = self._store.check([_TOLD])

    def _give_up(self) -> None:
        # This thread must end the process in any case: a store whose rank is stopped would keep us, and so would a
        # driver that keeps a call for ever and with it the interpreter, in which no Timer could run any more.
        faulthandler.dump_traceback_later(2 * _ANSWER_S, exit=True)
        threading.Timer(_ANSWER_S, self._give_up_on_the_store).start()
        waited = time.monotonic() - self._last
        logger.critical("no progress for %.0f s while %s; every thread's stack follows", waited, self._what)
        with self._log_file.open("a", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        records = self._log_file.with_name("flight-recorder")
        for prefix in keep_flight_records(records, self._world.rank):
            if self._world.is_main:
                logger.critical("the last collectives of each rank: torchfrtrace --prefix %s %s", prefix, records)
        with contextlib.suppress(RuntimeError):
            store = self._store or self._connect()
            store.set(_GIVEN_UP, "")
            logger.critical("%s", self._who_is_behind(store))
            time.sleep(2 * _LOOK_EVERY_S)  # for the others, who look a little later, to see that this rank lives
        os._exit(TRY_AGAIN)

    def _give_up_on_the_store(self) -> None:
        logger.critical("behind the others: rank 0, which does not even say where the others are")
        os._exit(TRY_AGAIN)

    def _who_is_behind(self, store: dist.Store) -> str:
        before = self._places(store)
        time.sleep(2.5 * _LOOK_EVERY_S)
        places = self._places(store)
        silent = [rank for rank, place in enumerate(places) if place == before[rank]]
        if silent:
            said = [f"rank {rank} ({places[rank][2]}), which gives no sign of life" for rank in silent]
            return f"behind the others: {', '.join(said)}"
        least = min(beats for beats, _, _ in places)
        behind = [f"rank {rank} ({what})" for rank, (beats, _, what) in enumerate(places) if beats == least]
        if len(behind) == self._world.world_size:
            return "all ranks are at the same place"
        return f"behind the others: {', '.join(behind)}"

    def _places(self, store: dist.Store) -> list[tuple[int, int, str]]:
        """Returns of each rank its beats and signs of life so far, and what it is doing."""
        places = []
        for rank in range(self._world.world_size):
            known = store.check([f"watchdog/{rank}"])
            text = store.get(f"watchdog/{rank}").decode() if known else "0 0 starting"
            beats, signs_of_life, what = text.split(" ", 2)
            places.append((int(beats), int(signs_of_life), what))
        return places
