"""Processes that make batches beside their rank, forked from a server that was forked before the rank had a thread.

POSIX promises next to nothing to the child of a process with threads: a lock that one of them holds at that moment is
never let go in the child. A rank that trains has threads of gloo or NCCL, of CUDA, of its saver and of its watchdog.
So `open_server` is the first thing that a rank does; all is imported by then, and its workers import nothing again.

What a worker is to make comes over a socket of its own: pickled, with arrays that are large as file descriptors. Over
it go the items, and back how many more are wanted. When the rank is gone, by whatever end, the sockets are closed, and
so the server and the workers end too.
"""

from __future__ import annotations

import ctypes
import gc
import io
import itertools
import logging
import logging.handlers
import math
import mmap
import os
import pickle
import queue
import signal
import socket
import struct
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
import torch

from crate_dist.run.faults import judged

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
"""To the whole process group they are for the ranks to answer; the workers go on until their rank ends them."""
_MOST_DESCRIPTORS = 64
_PR_SET_PDEATHSIG = 1
_LARGE_BYTES = 1 << 16
_NUMBER = struct.Struct("q")


class LostWorker(RuntimeError):
    """A worker, or the server from which they come, has ended by itself: killed, as when memory runs out."""


class Source(Protocol):
    """What workers make items of, by their numbers. It is pickled."""

    def __getitem__(self, number: int, /) -> Any: ...


class SharedArray:
    """Bytes that a process and its workers see and write alike. A file in memory: /dev/shm may be small."""

    def __init__(self, shape: Sequence[int], descriptor: int | None = None) -> None:
        self.descriptor = _file_in_memory(math.prod(shape)) if descriptor is None else descriptor
        self.array = _mapped(_Place(self.descriptor, 0, np.dtype(np.uint8), tuple(shape), writable=True))

    def __del__(self) -> None:
        os.close(self.descriptor)


class Workers(Iterator[Any]):
    """The items of `source` from `first` on, before `stop` or without end, which `count` processes make in turns.

    Each makes `ahead` items at most that were not yet asked for. What is raised for an item is raised here in its
    place; what a worker logs is logged here, with its next item.

    Raises
    ------
    LostWorker: from next()
    """

    def __init__(self, source: Source, count: int, ahead: int, first: int = 0, stop: int | None = None) -> None:
        self._workers: list[tuple[int, Connection]] = []
        self._server, self._owner = _server or _Server(), os.getpid()
        self._next, self._stop = first, stop
        with ExitStack() as files:
            pickler = _Pickler(files)
            pickled = pickler.pickled(source)
            if len(pickler.descriptors) >= _MOST_DESCRIPTORS:
                raise ValueError(
                    f"{len(pickler.descriptors)} large arrays in {type(source).__name__}, which is too many"
                )
            self._workers = [self._server.fork(pickler.descriptors) for _ in range(count)]
        for number, (_, connection) in enumerate(self._workers):
            with suppress(ConnectionError):  # next() will say it
                connection.send((first + number, stop, count, ahead))
                connection.send_bytes(pickled)
        self._turns = itertools.cycle(self._workers)

    def __next__(self) -> Any:
        if self._next == self._stop:
            raise StopIteration
        pid, connection = next(self._turns)
        try:
            sent: _Sent = connection.recv()
        except (EOFError, OSError):
            raise self._server.lost(pid) from None
        with suppress(ConnectionError):  # it has made its last item, or next() will say it
            connection.send_bytes(b"one more")
        self._next += 1
        for record in sent.records:
            logging.getLogger(record.name).handle(record)
        if sent.error is not None:
            raise sent.error
        return sent.item

    def __del__(self) -> None:
        for _, connection in self._workers:
            _ours.discard(connection.fileno())
            connection.close()
        if self._server is not _server and self._owner == os.getpid():
            self._server.close()


def open_server() -> None:
    """Forks the server, once in a process. Where nobody has called this, each loader forks a server of its own."""
    global _server
    _server = _server or _Server()


_ours: set[int] = set()
"""The descriptors of this process at whose other ends a server or a worker waits for them to be closed."""


def _let_go() -> None:
    """In a process that was just forked, as the next server is: what it inherited would keep those waiting for ever."""
    global _server
    _server = None
    if _ours:
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for descriptor in _ours:
            os.dup2(nothing, descriptor, inheritable=False)  # whoever has it as its own may still close it
        os.close(nothing)
        _ours.clear()


os.register_at_fork(after_in_child=_let_go)


class _Sent(NamedTuple):
    item: Any
    error: Exception | None
    records: list[logging.LogRecord]


class _Server:
    """A process that waits for orders to fork, and knows how its children ended."""

    def __init__(self) -> None:
        self._socket, other = socket.socketpair()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
        self._pid = os.fork()
        if self._pid == 0:
            try:
                self._socket.close()
                for number in _IGNORED:
                    signal.signal(number, signal.SIG_IGN)
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                gc.freeze()  # what is there already is not looked through, and so not copied, in any child
                _serve(other)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(1)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        other.close()
        _ours.add(self._socket.fileno())

    def fork(self, descriptors: Sequence[int]) -> tuple[int, Connection]:
        """A new worker, which has these descriptors: its process id, and the socket to speak to it."""
        mine, other = socket.socketpair()
        with other:
            pid = self._ask(0, [other.fileno(), *descriptors])
        _ours.add(mine.fileno())
        return pid, Connection(mine.detach())

    def lost(self, pid: int) -> LostWorker:
        """The error to raise for a worker that has closed its socket."""
        return LostWorker(f"DataLoader worker (pid {pid}) {_how(os.waitstatus_to_exitcode(self._ask(pid)))}")

    def close(self) -> None:
        """Ends the server; its children end with the sockets of their own."""
        _ours.discard(self._socket.fileno())
        self._socket.close()
        os.waitpid(self._pid, 0)

    def _ask(self, number: int, descriptors: Sequence[int] = ()) -> int:
        try:
            socket.send_fds(self._socket, [_NUMBER.pack(number)], descriptors)
            answer = self._socket.recv(_NUMBER.size)
        except ConnectionError:
            answer = b""
        if not answer:
            how = _how(os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1]))
            raise LostWorker(f"the process (pid {self._pid}) from which DataLoader workers are forked {how}")
        result: int = _NUMBER.unpack(answer)[0]
        if result < 0:
            raise LostWorker(f"cannot fork a DataLoader worker: {os.strerror(-result)}")
        return result


_server: _Server | None = None


def _serve(orders: socket.socket) -> NoReturn:
    """0: fork a worker and say its pid; else say how the one of that pid has ended."""
    ended: dict[int, int] = {}
    while True:
        order, descriptors, _, _ = socket.recv_fds(orders, _NUMBER.size, _MOST_DESCRIPTORS)
        if not order:
            os._exit(0)
        with suppress(ChildProcessError):
            while (child := os.waitpid(-1, os.WNOHANG))[0]:
                ended[child[0]] = child[1]
        number = _NUMBER.unpack(order)[0]
        if number:
            answer = ended[number] if number in ended else os.waitpid(number, 0)[1]
        else:
            server = os.getpid()
            try:
                answer = os.fork()
            except OSError as error:
                answer = -(error.errno or 1)
            if answer == 0:
                orders.close()
                _end_with_parent(server)
                _work(descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
        orders.send(_NUMBER.pack(answer))


def _end_with_parent(parent: int) -> None:
    """In a process that was just forked: it is killed when its parent ends, though it may be at work for minutes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the line above
            os._exit(1)


def _how(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _work(descriptors: Sequence[int]) -> NoReturn:
    """One worker: its socket, and the files of its arrays."""
    status = 1
    try:
        torch.set_num_threads(1)  # there are as many workers as cores are meant for them
        records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
        root = logging.getLogger()
        root.handlers = [logging.handlers.QueueHandler(records)]
        root.setLevel(logging.INFO)
        _make(Connection(descriptors[0]), descriptors[1:], records)
        status = 0
    except (EOFError, ConnectionError):  # the rank wants no more, or is gone
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _make(rank: Connection, descriptors: Sequence[int], records: queue.SimpleQueue[logging.LogRecord]) -> None:
    first, stop, step, ahead = rank.recv()
    source = _Unpickler(rank.recv_bytes(), descriptors).load()
    for made, number in enumerate(itertools.count(first, step)):
        if stop is not None and number >= stop:
            return
        if made >= ahead:
            rank.recv_bytes()
        item, error = None, None
        try:
            item = source[number]
        except Exception as raised:
            error = _portable(judged(raised))
        rank.send(_Sent(item, error, [records.get() for _ in range(records.qsize())]))


def _portable(error: Exception) -> Exception:
    """The error with its traceback as a note, or where it cannot be raised elsewhere another one that says the same."""
    text = "".join(traceback.format_exception(error))
    if isinstance(error, StopIteration):  # would end the items
        return RuntimeError(f"in a DataLoader worker:\n{text}")
    try:
        error.add_note(f"in a DataLoader worker:\n{text}")
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"in a DataLoader worker:\n{text}")
    return error


class _Place(NamedTuple):
    """Where an array lies: in an open file, or before pickling's other end the nth of them, behind `offset` bytes."""

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


class _Pickler(pickle.Pickler):
    """Leaves out large arrays: `descriptors` are the files in which they lie, open until `files` is closed.

    One that is mapped from a file which is still the same is mapped again, so that all processes of a node share its
    pages; of another one all workers share one copy.
    """

    def __init__(self, files: ExitStack) -> None:
        self._data = io.BytesIO()
        super().__init__(self._data, protocol=pickle.HIGHEST_PROTOCOL)
        self._files = files
        self.descriptors: list[int] = []

    def pickled(self, source: object) -> bytes:
        """The source, for an _Unpickler that has the descriptors."""
        self.dump(source)
        return self._data.getvalue()

    def persistent_id(self, thing: Any) -> _Place | None:
        """Called by pickle for every object; None: it is pickled as usual."""
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


class _Unpickler(pickle.Unpickler):
    """Of bytes that came from this program's own rank, over a socket that nobody else can open."""

    def __init__(self, data: bytes, descriptors: Sequence[int]) -> None:
        super().__init__(io.BytesIO(data))
        self._descriptors = descriptors

    def persistent_load(self, place: _Place) -> Any:
        """Called by pickle for what _Pickler has left out."""
        descriptor = self._descriptors[place.file]
        return SharedArray(place.shape, descriptor) if place.writable else _mapped(place._replace(file=descriptor))
