"""Shares arrays between a rank and its workers: no copy of them is sent, all map the same memory."""

from __future__ import annotations

import io
import logging
import math
import mmap
import os
import pickle
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import numpy as np
import torch

logger = logging.getLogger(__name__)

_LARGE_BYTES = 1 << 16


class SharedArray:
    """Bytes that a process and its workers see and write alike. A file in memory: /dev/shm may be small."""

    def __init__(self, shape: Sequence[int], descriptor: int | None = None) -> None:
        self._pinned: tuple[torch.device, int] | None = None
        self.descriptor = _file_in_memory(math.prod(shape)) if descriptor is None else descriptor
        self.array = _mapped(_Place(self.descriptor, 0, np.dtype(np.uint8), tuple(shape), writable=True))

    def pin(self, device: torch.device) -> None:
        """Locks the memory, so that a GPU copies from it beside what it computes. Says so where that cannot be done.

        The workers' mappings are of the same pages, which no fork copies, since they are shared.
        """
        with torch.cuda.device(device):
            status = torch.cuda.cudart().cudaHostRegister(self.array.ctypes.data, self.array.nbytes, 0)
        if int(status) == 0:
            self._pinned = device, os.getpid()
            return
        why = torch.cuda.cudart().cudaGetErrorString(status)
        logger.warning("the loader's memory could not be pinned (%s); batches are copied once more on their way", why)
        _forget_error(device)

    def _unpin(self) -> None:
        """Lets the memory go: CUDA would take what is mapped at this address next for the pages that it has locked."""
        if self._pinned is None or self._pinned[1] != os.getpid():
            return
        device, self._pinned = self._pinned[0], None
        with suppress(RuntimeError), torch.cuda.device(device):  # of a device that has failed, which somebody has said
            torch.cuda.synchronize(device)  # a copy from here may be under way
            if int(torch.cuda.cudart().cudaHostUnregister(self.array.ctypes.data)) != 0:
                _forget_error(device)

    def __del__(self) -> None:
        self._unpin()
        os.close(self.descriptor)


def _forget_error(device: torch.device) -> None:
    """Has torch ask for CUDA's last error, which stays until somebody does: the check of some later kernel, else.

    torch binds no cudaGetLastError; the check behind every kernel that it starts raises the error, and it is gone.
    """
    with suppress(RuntimeError):
        torch.ones(1, device=device)


class _Place(NamedTuple):
    """The place of an array: `offset` bytes into an open file, or once pickled into the nth of those sent along."""

    file: int
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    writable: bool = False


def _mapped(place: _Place) -> np.ndarray:
    pages = mmap.mmap(place.file, 0, access=mmap.ACCESS_WRITE if place.writable else mmap.ACCESS_READ)
    return np.ndarray(place.shape, place.dtype, pages, place.offset)


def _file_in_memory(size: int) -> int:
    if sys.platform == "linux":
        descriptor = os.memfd_create("batches")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


class Pickler(pickle.Pickler):
    """A pickler that leaves large arrays out: `descriptors` are their files, open until `files` is closed.

    One that is mapped from a file which is still the same is mapped again, so that all processes of a node share its
    pages; of another one all workers share one copy.
    """

    def __init__(self, files: ExitStack) -> None:
        self._data = io.BytesIO()
        super().__init__(self._data, protocol=pickle.HIGHEST_PROTOCOL)
        self._files = files
        self.descriptors: list[int] = []

    def pickled(self, source: object) -> bytes:
        """Pickles the source for an Unpickler that has the descriptors."""
        self.dump(source)
        return self._data.getvalue()

    def persistent_id(self, thing: Any) -> _Place | None:
        """Returns the place of an object that is left out; None: it is pickled as usual. Called by pickle."""
        if isinstance(thing, SharedArray):
            place = _Place(thing.descriptor, 0, thing.array.dtype, thing.array.shape, writable=True)
        elif isinstance(thing, np.ndarray) and thing.nbytes >= _LARGE_BYTES and not thing.dtype.hasobject:
            place = self._again(thing) or self._copied(thing)
        else:
            return None
        self.descriptors.append(place.file)
        return place._replace(file=len(self.descriptors) - 1)

    def _again(self, array: np.ndarray) -> _Place | None:
        if not isinstance(array, np.memmap) or not array.filename or not array.flags.c_contiguous:
            return None
        try:
            file = self._files.enter_context(open(array.filename, "rb")).fileno()  # noqa: SIM115
            place = _Place(file, array.offset, array.dtype, array.shape)
            there = _mapped(place)
        except (OSError, TypeError, ValueError):  # gone, or shorter than it was
            return None
        return place if np.array_equal(there.view(np.uint8), array.view(np.uint8)) else None

    def _copied(self, array: np.ndarray) -> _Place:
        copy = SharedArray((array.nbytes,))
        self._files.callback(lambda: copy)  # its file is open until then
        copy.array[:] = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        return _Place(copy.descriptor, 0, array.dtype, array.shape)


class Unpickler(pickle.Unpickler):
    """An unpickler of bytes that came from this program's own rank, over a socket that nobody else can open."""

    def __init__(self, data: bytes, descriptors: Sequence[int]) -> None:
        super().__init__(io.BytesIO(data))
        self._descriptors = descriptors

    def persistent_load(self, place: _Place) -> Any:
        """Maps an array that Pickler has left out. Called by pickle."""
        descriptor = self._descriptors[place.file]
        return SharedArray(place.shape, descriptor) if place.writable else _mapped(place._replace(file=descriptor))
