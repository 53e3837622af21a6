"""The process group: joins it, leaves it, and hands objects between its ranks."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from crate_dist.errors import UserError
from crate_dist.world import World

T = TypeVar("T")


class PortIsTaken(UserError, dist.DistNetworkError):
    """The ranks cannot meet where they should."""


class Left(Exception):
    """The ranks have left what they did together, since the run is told to stop; the next start makes it."""


def init_distributed(world: World, timeout_s: float = 1800.0) -> torch.device:
    """Joins the process group, and returns the device of this rank: its GPU with nccl, else the CPU with gloo.

    timeout_s: for all ranks to come, and for every collective

    Raises
    ------
    PortIsTaken: another program listens where rank 0 should
    RuntimeError: fewer GPUs on this node than ranks
    """
    # Libraries below read these; under srun they are not set.
    os.environ.update(world.environment())
    device = torch.device("cpu")
    if torch.cuda.is_available():
        visible = torch.cuda.device_count()
        # SLURM may show a task all GPUs of the node, or its own alone as number 0.
        number = world.local_rank if visible > 1 else 0
        if number >= visible or (visible == 1 and world.local_world_size > 1 and world.launcher != "slurm"):
            raise RuntimeError(
                f"{world.local_world_size} ranks on this node, but {visible} GPU(s) to be seen; "
                "start one rank per GPU, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on CPU"
            )
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    else:
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_world_size))
        if world.master_addr in ("127.0.0.1", "localhost"):
            # All on one machine: gloo need not look up a host name that may resolve to nowhere.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            rank=world.rank,
            world_size=world.world_size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise PortIsTaken(
            f"port {world.master_port} of {world.master_addr} is in use by another program, and rank 0 needs it; "
            "start again, or set MASTER_PORT to one that is free"
        ) from None
    return device


def leave_distributed() -> None:
    """Leaves the process group, also after an error, when other ranks may be waiting in a collective for ever.

    gloo's is left at once, and its threads would abort an interpreter that ended with them. nccl's would wait for the
    others: after an error it is left to the end of the process.
    """
    if dist.get_backend() == "gloo" or sys.exc_info()[0] is None:
        dist.destroy_process_group()


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
