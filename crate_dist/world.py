"""A process's place among the ranks, and under what it was started: torchrun, SLURM, or nothing. Imports no torch."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which torchrun tells a process its place; World's fields have the same names."""

_STARTS = ("SLURM_STEP_ID", "SLURM_RESTART_COUNT")


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

    def environment(self) -> dict[str, str]:
        """Returns VARIABLES as torchrun would set them for this place."""
        return {name: str(getattr(self, name.lower())) for name in VARIABLES}

    @property
    def cores(self) -> int:
        """Cores of this machine that are this rank's: those that SLURM gave its task, else its share of all."""
        there = len(os.sched_getaffinity(0))
        task = os.environ.get("SLURM_CPUS_PER_TASK", "") if self.launcher == "slurm" else ""
        return min(there, int(task)) if task.isdecimal() else max(there // self.local_world_size, 1)

    @property
    def is_main(self) -> bool:
        """True of rank 0, the one that reports and publishes."""
        return self.rank == 0


def detect_world(env: Mapping[str, str] = os.environ) -> World:
    """Reads the place of this process from the environment.

    torchrun's variables win over SLURM's, since torchrun may itself run under srun. SLURM's are believed only
    inside a step: the shell of an allocation has some of them too, and is no rank.

    Raises ValueError: variables that contradict each other.
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
        world = World(0, 1, 0, 1, "127.0.0.1", free_port(), "single process")
    if not 0 <= world.rank < world.world_size:
        raise ValueError(f"rank {world.rank} is not among {world.world_size} ranks: check RANK and WORLD_SIZE")
    return world


def node_name(env: Mapping[str, str] = os.environ) -> str:
    """Returns the name of this node, without its domain."""
    return env.get("SLURMD_NODENAME", socket.gethostname()).partition(".")[0]


def is_first_start(env: Mapping[str, str] = os.environ) -> bool:
    """Tells that nobody has started these ranks before: SLURM after a requeue, its batch script, or torchrun."""
    first = {"SLURM_RESTART_COUNT": "0", "CRATE_START": "1", "TORCHELASTIC_RESTART_COUNT": "0"}
    return all(env.get(name, count) == count for name, count in first.items())


def expand_nodelist(text: str) -> list[str]:
    """Returns the host names that a SLURM node list such as `gpu[01-03,7],login` means, in its order."""
    names: list[str] = []
    for item in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*", text):
        expanded = [""]
        for literal, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", item):
            choices = [literal] if literal else [n for part in ranges.split(",") for n in _expand_range(part)]
            expanded = [head + tail for head in expanded for tail in choices]
        names += expanded
    return names


def free_port() -> int:
    """Returns a TCP port of the loopback interface that nobody uses at this moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _local_tasks(env: Mapping[str, str], tasks: int, nodes: int) -> int:
    """Counts this node's tasks: SLURM_STEP_TASKS_PER_NODE looks like `8(x4),6`, SLURM_NODEID is the place in it."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    node = int(env.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else -(-tasks // nodes)


def _expand_range(part: str) -> list[str]:
    first, _, last = part.partition("-")
    return [f"{n:0{len(first)}d}" for n in range(int(first), int(last or first) + 1)]
