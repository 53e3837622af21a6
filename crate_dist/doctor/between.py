"""The stage "between": what lies between several GPUs of this machine, or between the nodes of an srun.

Under srun or torchrun every rank takes part, and rank 0 reports. Otherwise the stage starts a rank for each GPU of this
machine by itself, and on a CPU two, with gloo.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from crate_dist.distributed import exit_at_once, gather_objects, host_group, init_distributed, leave_distributed
from crate_dist.doctor import basics
from crate_dist.doctor.machine import torch_cuda, version
from crate_dist.doctor.nvidia import driver_version
from crate_dist.doctor.stage import Finding, Setting
from crate_dist.files import AppendedFile, whole_lines
from crate_dist.launching.ranks import rank_environment
from crate_dist.world import World, detect_world, free_port, node_name

_MEGABYTES = (2, 8, 32, 160)
_LINK_MB = 64
_IN_SMALL = (1, 4)
_SKEW_S = 1.0
_OFTEN = 8


def examine(setting: Setting) -> Iterator[Finding]:
    """Measures what the ranks send each other; rank 0 yields what comes of it."""
    world = detect_world()
    if world.world_size > 1:
        yield from measure(world, setting.small, setting.left_s)
        return
    ranks = torch.cuda.device_count() if setting.device == "cuda" else 2
    if ranks < 2:
        note = "on several nodes: srun python -m crate_dist.doctor --full --only between"
        yield Finding("several devices", "one device here", note=note)
        return
    port, told = free_port(), setting.scratch / "findings.jsonl"
    command = [sys.executable, "-u", "-m", "crate_dist.doctor.between", str(told), str(setting.left_s)]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if setting.device == "cpu" else {}
    processes = [
        subprocess.Popen(command, env={**os.environ, **rank_environment(rank, ranks, port), **hidden})
        for rank in range(ranks)
    ]
    read = 0
    while read < len(lines := whole_lines(told)) or any(process.poll() is None for process in processes):
        yield from (Finding(**json.loads(line)) for line in lines[read:])
        read = len(lines)
        time.sleep(0.05)
    wrong = {rank: process.returncode for rank, process in enumerate(processes) if process.returncode}
    yield Finding(
        "ranks that ended well", ranks - len(wrong), f"of {ranks}", "all", not wrong, str(wrong) if wrong else ""
    )


def main() -> int:
    """Takes part as a rank that `examine` has started; the arguments are a file for the findings and seconds."""
    world = detect_world()
    told = AppendedFile(Path(sys.argv[1])) if world.is_main else None
    for finding in measure(world, not torch.cuda.is_available(), float(sys.argv[2])):
        if told is not None:
            told.append(json.dumps(asdict(finding)).encode() + b"\n")
    return 0


def measure(world: World, small: bool, left_s: float) -> Iterator[Finding]:
    """Takes part as one rank; rank 0 yields the findings. A collective."""
    device = init_distributed(world, timeout_s=max(left_s - 5, 5))
    try:
        for part in (_alike, _nodes, _all_reduce, _links, _gloo):
            for finding in part(world, device, small):
                if world.is_main:
                    yield finding
    finally:
        leave_distributed()


def _alike(world: World, device: torch.device, small: bool) -> Iterator[Finding]:
    """Compares what the ranks compute with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    own = (f"torch {version('torch')}", f"CUDA {torch_cuda()}", f"driver {driver_version()}", name)
    everyone = gather_objects((*own, f"Python {sys.version.split()[0]}", f"deepspeed {version('deepspeed')}"))
    parts = [f"rank {rank}: {', '.join(set(one) - set(everyone[0]))}" for rank, one in enumerate(everyone)]
    odd = [part for part, one in zip(parts, everyone, strict=True) if one != everyone[0]]
    note = f"rank 0: {', '.join(everyone[0])}; {'; '.join(odd[:8])}" if odd else ""
    value = f"{world.world_size} {'not ' if odd else ''}alike"
    yield Finding("ranks", value, "", "the same software and GPUs", not odd, note)


def _nodes(world: World, device: torch.device, small: bool) -> Iterator[Finding]:
    """Looks at the basics of each node; yields what is amiss, by the node's name."""
    looked: list[Finding] = []
    if world.local_rank == 0:
        looked = [basics.host_name(), basics.clock(Path.cwd())]
        if not small:
            looked += [basics.shared_memory(world.local_world_size), basics.memory(world.local_world_size)]
            looked += [basics.c_compiler(needed=True)]
    gathered = gather_objects((node_name(), looked))
    nodes = [name for name, found in gathered if found]
    amiss = [(node, finding) for node, found in gathered for finding in found if finding.passed is False]
    for node, finding in amiss:
        value = f"{finding.value} {finding.unit}".strip()
        yield Finding(f"node {node}, {finding.name}", value, "", finding.expected, False, finding.note)
    yield Finding("nodes", len(nodes), "looked at", "nothing amiss", not amiss)


def _all_reduce(world: World, device: torch.device, small: bool) -> Iterator[Finding]:
    """Sums over the first 2, 4, 8, … ranks, with messages of several sizes."""
    counts = sorted({2**n for n in range(1, 11) if 2**n < world.world_size} | {world.world_size})
    for count in counts:
        group = dist.new_group(list(range(count)))
        rates = {}
        for megabytes in _IN_SMALL if small else _MEGABYTES:
            tensor = torch.zeros(megabytes * 2**20, dtype=torch.uint8, device=device).view(torch.float32)
            if world.rank < count:
                seconds = _timed(partial(dist.all_reduce, tensor, group=group), device)
                rates[megabytes] = 2 * (count - 1) / count * tensor.nbytes / seconds / 1e9
        dist.barrier()
        if rates:
            table = ", ".join(f"{megabytes} MB: {rate:.3g}" for megabytes, rate in rates.items())
            yield Finding(f"all-reduce over {count} ranks, each link", max(rates.values()), "GB/s", note=table)


def _links(world: World, device: torch.device, small: bool) -> Iterator[Finding]:
    """Sends from each rank to the next, one pair after the other, and names the slowest."""
    tensor = torch.zeros((_IN_SMALL[-1] if small else _LINK_MB) * 2**20, dtype=torch.uint8, device=device)
    names = gather_objects(node_name())
    taken = 0.0
    last = world.world_size - (world.world_size == 2)  # of two ranks there is one pair
    for rank in range(last):
        to = (rank + 1) % world.world_size
        if world.rank in (rank, to):
            operation = dist.isend if world.rank == rank else dist.irecv
            peer = to if world.rank == rank else rank

            seconds = _timed(partial(_exchange, operation, tensor, peer), device)
            taken = seconds if world.rank == rank else taken
        dist.barrier()
    rates = [tensor.nbytes / seconds / 1e9 for seconds in gather_objects(taken) if seconds]
    slowest = min(range(len(rates)), key=rates.__getitem__)
    to = (slowest + 1) % world.world_size
    value = f"{rates[slowest]:.3g} GB/s, rank {slowest} on {names[slowest]} to rank {to} on {names[to]}"
    within = [names[rank] == names[(rank + 1) % world.world_size] for rank in range(len(rates))]
    alike = [rate for rate, same in zip(rates, within, strict=True) if same == within[slowest]]
    # On a CPU it says who else computes there, and no more.
    well = None if small else rates[slowest] > median(alike) / 2
    kind = "in a node" if within[slowest] else "between nodes"
    note = (
        "" if well is not False else "exclude one of the two and see: nvidia-smi topo -m, nvidia-smi nvlink -s, ibstat"
    )
    expected = f"half of the median {kind} at least, {median(alike):.3g}"
    yield Finding("slowest link", value, "", expected, well, note, {"GB/s": rates})


def _exchange(operation: Callable[..., Any], tensor: torch.Tensor, peer: int) -> None:
    for work in dist.batch_isend_irecv([dist.P2POp(operation, tensor, peer)]):
        work.wait()


def _gloo(world: World, device: torch.device, small: bool) -> Iterator[Finding]:
    """Sums with gloo, as what signals and saves does, and compares the clocks of the nodes over it."""
    group = host_group()
    tensor, one = torch.zeros(2**20), torch.zeros(1)
    cpu = torch.device("cpu")
    rate = tensor.nbytes / _timed(lambda: dist.all_reduce(tensor, group=group), cpu) / 1e9
    latency = 1000 * _timed(lambda: dist.all_reduce(one, group=group), cpu)
    yield Finding("gloo, 4 MB over all ranks", rate, "GB/s", facts={"ms for one number": latency})

    heads = [rank for rank, head in enumerate(gather_objects(world.local_rank == 0)) if head]
    skews = {}
    for head in heads[1:]:
        best = float("inf")
        for _ in range(_OFTEN if world.rank in (0, head) else 0):
            now = torch.zeros(1, dtype=torch.float64)
            if world.is_main:
                asked = time.time()
                dist.send(now, head, group=group)
                dist.recv(now, head, group=group)
                took = time.time() - asked
                if took < best:
                    best, skews[head] = took, float(now) - asked - took / 2
            else:
                dist.recv(now, 0, group=group)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), 0, group=group)
    if skews:
        worst = max(skews, key=lambda rank: abs(skews[rank]))
        well = abs(skews[worst]) < _SKEW_S
        yield Finding(f"clock of rank {worst}, to rank 0's", skews[worst], "s", f"within {_SKEW_S:g} s", well)


def _timed(work: Callable[[], object], device: torch.device, times: int = 5) -> float:
    """Returns the seconds of one call after two that warm up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(2):
        work()
    wait()
    began = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - began) / times


if __name__ == "__main__":
    exit_at_once(main)
