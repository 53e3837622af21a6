"""Makes batches in processes beside their rank, forked from a server that was forked before the rank had a thread.

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
import itertools
import logging
import logging.handlers
import os
import pickle
import queue
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, NoReturn, Protocol

import torch

from crate_dist.data.shared import Pickler, Unpickler
from crate_dist.run.faults import judged

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
"""To the whole process group they are for the ranks to answer; the workers go on until their rank ends them."""
_MOST_DESCRIPTORS = 64
_PR_SET_PDEATHSIG = 1
_NUMBER = struct.Struct("q")


MOST_WORKERS = 8
"""Of a rank whose recipe does not say how many."""


def workers_of_rank(chosen: int | None, cores: int) -> int:
    """Returns how many workers a rank with so many cores has. chosen: data.workers; None: one core stays the rank's"""
    return min(max(cores - 1, 1), MOST_WORKERS) if chosen is None else chosen


class LostWorker(RuntimeError):
    """A worker, or the server from which they come, has ended by itself: killed, as when memory runs out."""


class Source(Protocol):
    """The maker of items, by their numbers, in each worker. It is pickled."""

    def __getitem__(self, number: int, /) -> Any: ...


class Workers(Iterator[Any]):
    """The items of `source` from `first` on, before `stop` or without end, which `count` processes make in turns.

    Each makes `ahead` items at most that were not yet asked for. What is raised for an item is raised here in its
    place; what a worker logs is logged here, with its next item.

    Raises LostWorker: from next().
    """

    def __init__(self, source: Source, count: int, ahead: int, first: int = 0, stop: int | None = None) -> None:
        self._workers: list[tuple[int, Connection]] = []
        self._server, self._owner = _server or _Server(), os.getpid()
        self._next, self._stop = first, stop
        with ExitStack() as files:
            pickler = Pickler(files)
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
    """Closes what a process that was just forked, as the next server, inherited: those would wait for ever."""
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
        """Forks a worker, which has these descriptors. Returns its process id, and the socket to speak to it."""
        mine, other = socket.socketpair()
        with other:
            pid = self._ask(0, [other.fileno(), *descriptors])
        _ours.add(mine.fileno())
        return pid, Connection(mine.detach())

    def lost(self, pid: int) -> LostWorker:
        """Returns the error to raise for a worker that has closed its socket."""
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
    """Answers orders. 0: forks a worker and says its pid; else: says how the one of that pid has ended."""
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
    """Has this process, just forked, killed when its parent ends, though it may be at work for minutes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the line above
            os._exit(1)


def _how(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _work(descriptors: Sequence[int]) -> NoReturn:
    """Runs one worker. descriptors: its socket, and the files of its arrays."""
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
    source = Unpickler(rank.recv_bytes(), descriptors).load()
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
    """Returns the error with its traceback as a note, or one that says the same where it cannot be pickled."""
    text = "".join(traceback.format_exception(error))
    if isinstance(error, StopIteration):  # would end the items
        return RuntimeError(f"in a DataLoader worker:\n{text}")
    try:
        error.add_note(f"in a DataLoader worker:\n{text}")
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"in a DataLoader worker:\n{text}")
    return error
