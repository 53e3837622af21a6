"""The process group: joins it, leaves it, and hands objects between its ranks."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from crate_dist.errors import UserError
from crate_dist.network import interface_of, is_loopback, source_address
from crate_dist.world import World, is_first_start

T = TypeVar("T")

_FORMING_S = 300.0
"""For gloo to connect the ranks, which have all met by then."""
_SIGN_EVERY_S = 1.0
_RECORDED = 2000
"""Collectives in each of torch's flight recorders."""


class PortIsTaken(UserError, dist.DistNetworkError):
    """The ranks cannot meet where they should."""


class CannotConnect(UserError):
    """The ranks live, and have met, and cannot reach each other by the network that gloo takes."""


class TooFewGPUs(UserError):
    """There is no GPU for this rank."""


class Left(Exception):
    """The ranks have left what they did together, since the run is told to stop; the next start makes it."""


def device_type() -> str:
    """Returns "cuda" where torch sees a GPU, else "cpu": what the ranks compute on, here and in DeepSpeed."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_device(world: World, visible: int, env: Mapping[str, str] = os.environ) -> torch.device:
    """Returns the device of a rank that sees `visible` GPUs.

    A rank takes the GPU of its number among the ranks of its node. One that sees fewer GPUs than there are ranks on
    the node sees only its own (`srun --gpus-per-task=1`), or those that it shares with its neighbours
    (`--gpu-bind=closest`): it counts round.

    Raises TooFewGPUs: all ranks of the node see the same GPUs, and those are fewer.
    """
    if not visible:
        return torch.device("cpu")
    shown_apart = world.launcher == "slurm" or ("CUDA_VISIBLE_DEVICES" in env and "TORCHELASTIC_RUN_ID" not in env)
    if visible < world.local_world_size and not shown_apart:
        raise TooFewGPUs(
            f"{world.local_world_size} ranks on this node, but {visible} GPU(s) to be seen; "
            "start one rank per GPU, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    return torch.device("cuda", world.local_rank % visible)


def init_distributed(world: World, timeout_s: float = 1800.0, longest_s: float = 0.0) -> torch.device:
    """Joins the process group, and returns the device of this rank: its GPU with nccl, else the CPU with gloo.

    timeout_s: for all ranks to come, and for every collective; longest_s: what set_timeout may make of it later

    Raises
    ------
    PortIsTaken: another program listens where rank 0 should
    TooFewGPUs: fewer GPUs on this node than ranks
    CannotConnect: at the first start, all ranks live and gloo cannot connect them
    RuntimeError: this rank sees no GPU, and others do
    """
    global _place
    # Libraries below read these; under srun they are not set.
    os.environ.update(world.environment())
    device = choose_device(world, torch.cuda.device_count() if device_type() == "cuda" else 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes it for the number of the device
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_world_size))
    _prepare_torch(max(timeout_s, longest_s))
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        store, *_ = next(dist.rendezvous("env://", world.rank, world.world_size, timeout=timeout))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise PortIsTaken(
            f"port {world.master_port} of {world.master_addr} is in use by another program, and rank 0 needs it; "
            "start again, or set MASTER_PORT to one that is free"
        ) from None
    store.set_timeout(timeout)
    _check_device(device, store, world)
    _choose_interface(store, world)
    _place = world, timeout
    _groups.clear()
    joining: dict[str, Any] = {"store": store, "rank": world.rank, "world_size": world.world_size}
    if device.type == "cuda":
        # Bound to its device, nccl connects here rather than at the first collective, and asks nowhere which it is.
        # The group of one rank has nobody to connect to, and is not to be split.
        bound = device if world.world_size > 1 else None
        dist.init_process_group("nccl", timeout=timeout, device_id=bound, **joining)
        adopt(dist.group.WORLD)
    else:
        _form(lambda brief: dist.init_process_group("gloo", timeout=brief, **joining))
    return device


def host_group() -> dist.ProcessGroup:
    """Makes a gloo group of all ranks, for what is to meet neither the device nor the collectives of the step.

    A collective. Raises CannotConnect as init_distributed does.
    """
    return _form(lambda brief: dist.new_group(backend="gloo", timeout=brief))


def set_timeout(timeout_s: float) -> None:
    """Gives all groups another time-out, also those that are yet to be made."""
    global _place
    assert _place is not None, "init_distributed has not been called"
    _place = _place[0], datetime.timedelta(seconds=timeout_s)
    for group in _groups:
        _set_pg_timeout(_place[1], group)


def adopt(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Gives a group our time-out, now and when it changes: nccl's own would end a rank before the watchdog does."""
    assert _place is not None, "init_distributed has not been called"
    assert group is not None
    _set_pg_timeout(_place[1], group)
    _groups.append(group)
    return group


_place: tuple[World, datetime.timedelta] | None = None
"""Of this process among the ranks, and the time-out of its groups."""
_groups: list[dist.ProcessGroup] = []


def _prepare_torch(longest_s: float) -> None:
    """Sets what torch reads when it makes the first group, where the user has not."""
    if not {"TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"} & os.environ.keys():
        os.environ["TORCH_FR_BUFFER_SIZE"] = str(_RECORDED)
    # A thread of nccl's that is stuck in the driver for this long makes torch end the process, without any stacks.
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(round(longest_s)))


def _check_device(device: torch.device, store: dist.Store, world: World) -> None:
    """Compares this rank's device with rank 0's, and rank 0's with all, before nccl and gloo wait for each other."""
    store.set(f"device/{world.rank}", device.type)
    others = store.multi_get([f"device/{rank}" for rank in (range(world.world_size) if world.is_main else [0])])
    if device.type == "cpu" and b"cuda" in others:
        # CUDA's words, by which the node is known to be broken.
        raise RuntimeError("no CUDA-capable device is detected on this node, but other ranks have one")


def _choose_interface(store: dist.Store, world: World) -> None:
    """Tells gloo the interface that leads to the other machines, unless the user has.

    By itself it takes the address of the host name, by which it cannot be reached where that is 127.0.1.1, Debian's
    default. (nccl passes over the loopback by itself.) On rank 0's machine the way to MASTER_ADDR may be the loopback
    too; the way to the others is not.
    """
    address = source_address(world.master_addr)
    store.set(f"address/{world.rank}", address or "")
    if address is None:
        return
    if is_loopback(address):
        others = (text.decode() for text in store.multi_get([f"address/{n}" for n in range(world.world_size)]))
        far = next((other for other in others if other and not is_loopback(other)), None)
        address = (far and source_address(far)) or address
    if interface := interface_of(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _form(make: Callable[[datetime.timedelta], dist.ProcessGroup | None]) -> dist.ProcessGroup:
    """Makes a gloo group with a brief time-out, and gives it ours.

    Where that fails a rank has died, and the launcher ends the others; or all live, and the network is at fault.
    """
    assert _place is not None
    world, timeout = _place
    signs = _Signs(world)
    try:
        group = make(min(timeout, datetime.timedelta(seconds=_FORMING_S)))
    except RuntimeError as error:
        signs.end()
        if not (lost_a_rank(error) and is_first_start() and signs.all_live()):
            raise
        raise CannotConnect(
            f"the ranks have met at {world.master_addr}:{world.master_port} and all live, but gloo cannot connect them "
            f"over the interface {os.environ.get('GLOO_SOCKET_IFNAME', 'of the host name')}: {error}; export "
            "GLOO_SOCKET_IFNAME= with one that leads to the other nodes, or have their firewalls let any port pass"
        ) from None
    signs.end()
    return adopt(group or dist.group.WORLD)


class _Signs:
    """Tells the other ranks that this one lives, while its main thread waits in gloo."""

    def __init__(self, world: World) -> None:
        # A connection of our own: the process group's is kept busy by whoever waits on it.
        self._store = dist.TCPStore(world.master_addr, world.master_port, wait_for_workers=False)
        self._world = world
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="signs of life", daemon=True)
        self._thread.start()

    def _go_on(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store's rank is gone, and so will this one be soon
            for number in itertools.count():
                self._store.set(f"sign/{self._world.rank}", str(number))
                if self._over.wait(_SIGN_EVERY_S):
                    return

    def end(self) -> None:
        """Leaves a last sign, by which this rank is known to have lived up to here."""
        self._over.set()
        self._thread.join()
        with contextlib.suppress(RuntimeError):
            self._store.set(f"sign/{self._world.rank}", "last")

    def all_live(self) -> bool:
        """Tells whether every rank gives signs of life, or has come to the end of its wait."""
        with contextlib.suppress(RuntimeError):
            before = self._read()
            time.sleep(2.5 * _SIGN_EVERY_S)
            living = all(
                now == b"last" or now not in (b"", then) for then, now in zip(before, self._read(), strict=True)
            )
            time.sleep(2.5 * _SIGN_EVERY_S * self._world.is_main)  # with rank 0 goes the store, which others still read
            return living
        return False

    def _read(self) -> list[bytes]:
        keys = [f"sign/{rank}" for rank in range(self._world.world_size)]
        return [self._store.get(key) if self._store.check([key]) else b"" for key in keys]


def leave_distributed() -> None:
    """Leaves the process group, also after an error, when other ranks may be waiting in a collective for ever.

    gloo's is left at once, and its threads would abort an interpreter that ended with them. nccl's would wait for the
    others: after an error it is left to the end of the process.
    """
    if dist.get_backend() == "gloo" or sys.exc_info()[0] is None:
        dist.destroy_process_group()
        _groups.clear()  # with the last of them goes the store, and rank 0's port is free again


def exit_at_once(main: Callable[[], int]) -> NoReturn:
    """Calls `main` and ends the process with its status, without taking the interpreter down in order.

    A thread of a communication library that is still there then would abort it, after all has gone well.
    """
    try:
        status = main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(bool(error.code))
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)  # noqa: T201
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
        status = 1
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(status)


def lost_a_rank(error: BaseException) -> bool:
    """Tells whether a collective failed because another rank is out of reach: nccl by type, gloo by text."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Returns the picklable `value` of every rank, in rank order, on every rank. A collective."""
    gathered: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered  # type: ignore[return-value]
