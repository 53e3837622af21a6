"""The one place that knows under what a process was started: torchrun, SLURM (srun or submitit), or nothing."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

_STARTS = ("SLURM_STEP_ID", "SLURM_RESTART_COUNT")


class PortIsTaken(dist.DistNetworkError):
    """The ranks cannot meet where they should."""


class Left(Exception):
    """What the ranks did together was left, since the run is told to stop; the next start makes it."""


@dataclass(frozen=True)
class World:
    """This process's place among all."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    launcher: str

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that reports and publishes."""
        return self.rank == 0


def detect_world(env: Mapping[str, str] = os.environ) -> World:
    """Reads the place of this process from the environment.

    torchrun's variables win over SLURM's, since torchrun may itself run under srun. SLURM's are believed only
    inside a step: the shell of an allocation has some of them too, and is no rank.

    Raises
    ------
    ValueError: variables that contradict each other
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        world = World(
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            local_rank=int(env.get("LOCAL_RANK", 0)),
            local_world_size=int(env.get("LOCAL_WORLD_SIZE", 1)),
            master_addr=env.get("MASTER_ADDR", "127.0.0.1"),
            master_port=int(env.get("MASTER_PORT", 29500)),
            launcher="torchrun",
        )
    elif "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        nodes = expand_nodelist(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "localhost"))
        tasks = int(env["SLURM_STEP_NUM_TASKS"])
        world = World(
            rank=int(env["SLURM_PROCID"]),
            world_size=tasks,
            local_rank=int(env.get("SLURM_LOCALID", 0)),
            local_world_size=_local_tasks(env, tasks, len(nodes)),
            master_addr=env.get("MASTER_ADDR", nodes[0]),
            # A port that follows from the job and the step: all ranks know it, and two jobs on a node do not collide.
            # It is another one after each requeue, since this one may be why.
            master_port=int(
                env.get(
                    "MASTER_PORT",
                    20000 + (7 * int(env.get("SLURM_JOB_ID", 0)) + sum(int(env.get(n, 0)) for n in _STARTS)) % 20000,
                )
            ),
            launcher="slurm",
        )
    else:
        world = World(0, 1, 0, 1, "127.0.0.1", _free_port(), "single process")
    if not 0 <= world.rank < world.world_size:
        raise ValueError(f"rank {world.rank} is not among {world.world_size} ranks: check RANK and WORLD_SIZE")
    return world


def is_first_start(env: Mapping[str, str] = os.environ) -> bool:
    """Whether nobody has started these ranks before: SLURM after a requeue, its batch script, or torchrun."""
    first = {"SLURM_RESTART_COUNT": "0", "CRATE_START": "1", "TORCHELASTIC_RESTART_COUNT": "0"}
    return all(env.get(name, count) == count for name, count in first.items())


def expand_nodelist(text: str) -> list[str]:
    """The host names that a SLURM node list such as `gpu[01-03,7],login` means, in its order."""
    names: list[str] = []
    for item in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*", text):
        expanded = [""]
        for literal, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", item):
            choices = [literal] if literal else [n for part in ranges.split(",") for n in _expand_range(part)]
            expanded = [head + tail for head in expanded for tail in choices]
        names += expanded
    return names


def init_distributed(world: World, timeout_s: float = 1800.0) -> torch.device:
    """Joins the process group, and gives the device of this rank: its GPU with nccl, else the CPU with gloo.

    timeout_s: how long it may take all ranks to come, and how long a collective may take

    Raises
    ------
    PortIsTaken: another program listens where rank 0 should
    RuntimeError: fewer GPUs on this node than ranks
    """
    # Libraries below read these; under srun they are not set.
    os.environ.update(
        RANK=str(world.rank),
        WORLD_SIZE=str(world.world_size),
        LOCAL_RANK=str(world.local_rank),
        LOCAL_WORLD_SIZE=str(world.local_world_size),
        MASTER_ADDR=world.master_addr,
        MASTER_PORT=str(world.master_port),
    )
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
    """Whether a collective failed because another rank is out of reach: nccl says it by type, gloo by text."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The picklable `value` of every rank, in rank order, on every rank. A collective."""
    gathered: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered  # type: ignore[return-value]


def _local_tasks(env: Mapping[str, str], tasks: int, nodes: int) -> int:
    """SLURM_STEP_TASKS_PER_NODE looks like `8(x4),6`; this node's entry is found by SLURM_NODEID."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    node = int(env.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else -(-tasks // nodes)


def _expand_range(part: str) -> list[str]:
    first, _, last = part.partition("-")
    return [f"{n:0{len(first)}d}" for n in range(int(first), int(last or first) + 1)]


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
