"""Remote shards for one reading process: what it needs now and will need soon is held in the node's cache.

A thread goes through the plan ahead of the reader and fetches shards in the order in which they will be needed. All
loader workers of a node do so, each for its own rank's plan; the cache sees to it that each shard is fetched by one of
them, so that they fetch as many at a time as there are workers.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Container

import numpy as np
from numpy.typing import NDArray

from crate_dist.data.index import ShardError, ShardIndex
from crate_dist.data.remote.cache import CacheIsFull, ShardCache
from crate_dist.data.remote.cache_folder import close

logger = logging.getLogger(__name__)

Plan = Callable[[int], NDArray[np.int64] | None]
"""The sample ids of item n of a data set; None behind its last one."""
_MOST_HELD = 256
"""Shards that one process holds at most, each of which is an open file."""
_MOST_HELD_UNPLANNED = 16
_MOST_AWAITED = 8
"""Shards that other processes may be fetching before the plan is followed further."""
_MOST_AHEAD = 4096
"""Items of the plan that are looked at ahead of the reader, and how many of them in one step."""
_AT_ONCE = 64
_POLL_S, _NO_ROOM_POLL_S = 0.05, 0.5
ROOM_TIMEOUT_S = 30.0
"""Seconds that a reader waits for others to let go of shards before it gives up."""


class CachedShards:
    """Descriptors of shards, held in the cache from some time before their need until after it.

    plan: None for no looking ahead
    """

    def __init__(self, index: ShardIndex, plan: Plan | None) -> None:
        assert index.remote is not None
        self._held: OrderedDict[int, int] = OrderedDict()
        self._shards, self._plan = index.shards, plan
        self._cache = ShardCache(index.remote, check=not index.has_checksums)
        self._sound: set[int] = set()
        self._read: int | None = None
        self._ends = np.cumsum(index.shard_sizes)
        self._last_need: dict[int, int] = {}
        self._awaited: list[int] = []
        self._now = self._seen = -1
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def at(self, number: int) -> None:
        """Takes up item `number`: what only earlier ones needed is let go, what comes next is fetched."""
        if self._plan is None:
            return
        known = self._now <= number <= self._seen
        needed = None if known else self._needed(number)
        with self._lock:
            self._now = number
            if needed is None:
                self._last_need = {shard: last for shard, last in self._last_need.items() if last >= number}
                self._awaited = [shard for shard in self._awaited if shard in self._last_need]
            else:
                self._last_need, self._awaited = {}, []
                self._note(number, needed)
            self._let_go_but(self._last_need)
        if self._thread is None:
            # The thread keeps no reader alive: it ends when the loader of this one is gone.
            self._thread = threading.Thread(target=_follow, args=(weakref.ref(self),), name="fetch-ahead", daemon=True)
            self._thread.start()

    def descriptor(self, shard: int) -> int:
        """Returns the descriptor of a shard by its number, fetched now if need be. Raises ShardError."""
        deadline = time.monotonic() + ROOM_TIMEOUT_S
        while True:
            with self._lock:
                if shard in self._held:
                    self._held.move_to_end(shard)
                    self._read = shard  # until the next one is asked for
                    return self._held[shard]
            try:
                descriptor = self._cache.hold(self._shards[shard])
            except CacheIsFull:
                with self._lock:
                    self._let_go_but({})  # its own future gives way first
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)
                continue
            assert descriptor is not None
            with self._lock:
                if len(self._held) >= (_MOST_HELD if self._plan else _MOST_HELD_UNPLANNED):
                    close(self._held.popitem(last=False)[1])
            self._keep(shard, descriptor)

    def renewed(self, shard: int) -> bool:
        """Tells whether a shard was found damaged in the cache, so that its next descriptor is of another file."""
        if shard in self._sound or self._cache.is_sound(self.descriptor(shard), self._shards[shard]):
            self._sound.add(shard)
            return False
        with self._lock:
            if shard in self._held:
                close(self._held.pop(shard))
        return True

    def fetch_next(self) -> float:
        """Takes one step ahead of the reader. Returns how many seconds to pause before the next one.

        While another process cannot have a shard that it needs now, the future of this one gives way: its reader may
        stand still until that process goes on, and would let go of nothing.
        """
        if self._cache.room_is_wanted():
            with self._lock:
                future = [shard for shard in self._held if shard in self._last_need and shard != self._read]
                self._awaited = [*future, *self._awaited]
                self._let_go_but({self._read})
            return _NO_ROOM_POLL_S
        for shard in self._awaited:
            descriptor = None
            try:
                descriptor = self._cache.hold(self._shards[shard], ahead=True)
            except CacheIsFull:
                return _NO_ROOM_POLL_S
            except ShardError as error:
                logger.warning("%s; it will be tried again when it is needed", error)
                self._awaited = [other for other in self._awaited if other != shard]
                return 0.0
            if descriptor is not None:
                self._keep(shard, descriptor)
                return 0.0
        return 0.0 if self._look_further() else _POLL_S

    def _look_further(self) -> bool:
        """Follows the plan to the next shard that is not held. Returns whether it went on at all."""
        awaited = len(self._awaited)
        if awaited >= _MOST_AWAITED or len(self._held) + awaited >= _MOST_HELD:
            return False
        before = self._seen
        for number in range(before + 1, min(before + _AT_ONCE, self._now + _MOST_AHEAD) + 1):
            if (needed := self._needed(number)) is None:
                break
            with self._lock:
                if self._seen != number - 1:
                    break  # the reader has jumped
                self._note(number, needed)
            if len(self._awaited) > awaited:
                break
        return self._seen != before

    def _needed(self, number: int) -> list[int] | None:
        """Returns the shards of an item, in the order in which it reads them; None behind the last item."""
        assert self._plan is not None
        samples = self._plan(number)
        if samples is None:
            return None
        return list(dict.fromkeys(np.searchsorted(self._ends, samples, side="right").tolist()))

    def _note(self, number: int, needed: list[int]) -> None:
        self._seen = number
        self._last_need |= dict.fromkeys(needed, number)
        news = [shard for shard in needed if shard not in self._held and shard not in self._awaited]
        self._awaited = self._awaited + news

    def _keep(self, shard: int, descriptor: int) -> None:
        with self._lock:
            if shard in self._held:
                close(descriptor)
            self._held.setdefault(shard, descriptor)
            self._awaited = [other for other in self._awaited if other != shard]

    def _let_go_but(self, needed: Container[int | None]) -> None:
        """Closes all other descriptors, none of which the reader reads at that moment. The caller holds the lock."""
        for shard in [shard for shard in self._held if shard not in needed]:
            close(self._held.pop(shard))

    def __del__(self) -> None:
        for descriptor in self._held.values():
            close(descriptor)


def _follow(reader: weakref.ref[CachedShards]) -> None:
    while (shards := reader()) is not None:
        pause_s = shards.fetch_next()
        del shards
        time.sleep(pause_s)
