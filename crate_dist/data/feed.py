"""Brings batches to the device: on a GPU the next one is copied, on a stream of its own, while this one is used.

What waits for what, so that no memory is written while somebody still reads it:

- A slot of the loader is written again when HELD_BATCHES further ones were fetched; the host waits for the copy of that
  many ago before it fetches one. That is the only wait of the host here, and a copy so old is rarely still under way.
- A batch's memory on the device goes back to the stream that copies as soon as nobody holds it on the host, though the
  device may only come to read it. So a copy begins when all is done that was asked of the device before the last batch
  was handed over. Not by `record_stream`: what a host that runs ahead lets go would pile up until the device has caught
  up, as many batches as the host is ahead.
- What uses a batch comes after its copy.

A copy from memory that is not pinned would have the host wait for the stream: what is not, labels and images for
evaluation, and all where the loader's memory could not be, goes through pinned memory of torch's own.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from crate_dist.data.loader import HELD_BATCHES, Batch, TrainLoader


class Feed(Iterator[Batch]):
    """Batches with images and labels on the device; on a CPU they are the loader's.

    wait_s: seconds that were spent waiting for the loader, since the beginning
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._stream = _copying_stream(device) if device.type == "cuda" else None
        self._copies: deque[torch.cuda.Event] = deque()
        self._staged: Batch | None = None
        self.wait_s = 0.0
        if self._stream is not None and isinstance(batches, TrainLoader):
            batches.source.slots.pin(device)  # while the workers make the first batches

    def __next__(self) -> Batch:
        if self._stream is None:
            batch = self._fetch()
        else:
            batch = self._staged if self._copies else self._stage(self._stream)
            if batch is not None:
                torch.cuda.current_stream(self._device).wait_event(self._copies[-1])
                self._staged = self._stage(self._stream)
        if batch is None:
            raise StopIteration
        return batch

    def _stage(self, stream: torch.cuda.Stream) -> Batch | None:
        if len(self._copies) == HELD_BATCHES:
            self._copies.popleft().synchronize()
        batch = self._fetch()
        if batch is None:
            return None
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            images, labels = (
                tensor.pin_memory().to(self._device, non_blocking=True) for tensor in (batch.images, batch.labels)
            )
            copied = torch.cuda.Event(blocking=True)  # the host sleeps, and a worker has its core
            copied.record(stream)
        self._copies.append(copied)
        return batch._replace(images=images, labels=labels)

    def _fetch(self) -> Batch | None:
        began = time.perf_counter()
        batch = next(self._batches, None)
        self.wait_s += time.perf_counter() - began
        return batch


def to_device(array: np.ndarray[Any, Any], device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Returns a copy of what the host has computed; no wait for the device."""
    tensor = torch.from_numpy(array).to(dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@functools.cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    """Returns the one stream of this process that copies. torch has 32, and gives the 33rd asker the first again."""
    return torch.cuda.Stream(device)
