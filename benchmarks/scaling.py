"""Counts what a step sends as it scales; for 1 to 64 nodes, from a model that states its assumptions, its time.

    python benchmarks/scaling.py [--arch crate_base] [--step-ms MS --micro-batch N] [--gpus-per-node 8] …

1. Traffic: on 2 and 4 local ranks every collective of three steps is counted as it passes torch.distributed, for
   crate_dist.training.engine (ZeRO-2) and for torch's DistributedDataParallel, in each way that the engine can be set.
2. Weak scaling on 1, 2 and 4 local processes, one thread each, against what the model says of them.
3. The model, for nodes of GPUs: a step is its compute, plus the gradients' reduction as far as the backward pass does
   not hide it, plus the weights' gathering, which nothing hides. A ring moves (n - 1) / n of a vector per phase.

--step-ms is one GPU's step without communication, as benchmarks/step.py measures it; without it the counted work at
--mfu of --peak-tflops stands in.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # so that what a bare Python lacks is told by crate_dist
from crate_dist.config import Recipe, load_recipe
from crate_dist.launching.memory import parameters
from crate_dist.launching.ranks import rank_environment
from crate_dist.world import free_port

CLASSES = 1000
WARM_UP, COUNTED = 2, 3


@dataclass(frozen=True)
class Network:
    """Bytes per second that one GPU sends in a ring, within and between nodes, and the latency of a message."""

    inside: float
    between: float
    latency_s: float

    def ring_s(self, sent: float, ranks: int, nodes: int, messages: int) -> float:
        """Returns the seconds to send a number of bytes per rank; the slowest link of the ring decides."""
        if ranks == 1:
            return 0.0
        return sent / (self.between if nodes > 1 else self.inside) + messages * self.latency_s * nodes


def main() -> int:
    """Prints the three tables."""
    arguments = parse()
    if arguments.as_rank:
        return as_rank(arguments)
    recipe = load_recipe(arguments.arch, arguments.overrides)
    count = parameters(recipe, CLASSES)
    print(f"{arguments.arch}: {count / 1e6:.2f} M parameters\n")
    if not arguments.model_only:
        measured(arguments, count)
    model(arguments, recipe, count)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="crate_base", help="recipe in configs/ [%(default)s]")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE")
    parser.add_argument("--local-batch", type=int, default=2, metavar="N", help="images per local rank [%(default)s]")
    parser.add_argument("--model-only", action="store_true", help="the third table alone")
    given = parser.add_argument_group("assumptions of the model")
    given.add_argument("--micro-batch", type=int, default=128, metavar="N", help="images per GPU [%(default)s]")
    given.add_argument("--step-ms", type=float, metavar="MS", help="measured step of one GPU [from --mfu]")
    given.add_argument("--mfu", type=float, default=0.4, help="share of --peak-tflops [%(default)s]")
    given.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 of an H100 [%(default)s]")
    given.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="[%(default)s]")
    given.add_argument("--inside-gb-s", type=float, default=300.0, help="ring within a node [%(default)s]")
    given.add_argument("--between-gb-s", type=float, default=35.0, help="per GPU between nodes [%(default)s]")
    given.add_argument("--latency-us", type=float, default=20.0, help="per message and node [%(default)s]")
    given.add_argument("--hidden", type=float, default=0.8, help="share of a reduction that can hide [%(default)s]")
    parser.add_argument("--as-rank", choices=["zero-2", "zero-2 to all", "ddp"], help=argparse.SUPPRESS)
    return parser.parse_args()


# --- 1 and 2: local ranks -------------------------------------------------------------------------------------------


def measured(arguments: argparse.Namespace, count: int) -> None:
    """Traffic and weak scaling of local processes."""
    print("| | ranks | collectives per step | bytes per parameter, sent by a rank | step, s | CPU s of a rank |")
    print("|---|---|---|---|---|---|")
    for kind in ("zero-2", "zero-2 to all", "ddp"):
        for ranks in (1, 2, 4):
            said = start_ranks(arguments, kind, ranks)
            calls = ", ".join(f"{number} {name}" for name, number in said["calls"].items()) or "none"
            print(
                f"| {kind} | {ranks} | {calls} | {said['sent'] / count:.2f} | {said['step_s']:.2f} "
                f"| {said['cpu_s']:.2f} |",
                flush=True,
            )
    print(f"\n{len(os.sched_getaffinity(0))} cores, one thread per rank: more ranks than cores share them.\n")


def start_ranks(arguments: argparse.Namespace, kind: str, ranks: int) -> dict[str, Any]:
    """Starts local processes as `ranks` ranks, and returns what rank 0 reports."""
    port, alone = free_port(), {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, *sys.argv, "--as-rank", kind],
            env={**os.environ, **rank_environment(rank, ranks, port), **alone},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = [process.communicate()[0] for process in processes]
    for process in processes:
        if process.returncode:
            raise RuntimeError(f"a rank of {kind} ended with {process.returncode}")
    answer: dict[str, Any] = json.loads(said[0].splitlines()[-1])
    return answer


def as_rank(arguments: argparse.Namespace) -> int:
    """Takes steps as one rank and prints what passed."""
    import torch

    from crate_dist.distributed import init_distributed
    from crate_dist.world import detect_world

    passed = listen()  # before anything binds the functions
    world = detect_world()
    device = init_distributed(world)
    batch = arguments.local_batch
    settings = [f"train.global_batch={batch * world.world_size}", "train.precision=bf16", *arguments.overrides]
    recipe = load_recipe(arguments.arch, settings)
    step = ddp(recipe) if arguments.as_rank == "ddp" else zero(recipe, device, batch, "all" in arguments.as_rank)
    side = recipe.model.image_size
    generator = torch.Generator().manual_seed(world.rank)
    images = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8, generator=generator)
    given = images, torch.zeros(batch, dtype=torch.int64)
    seconds, cpu = [], []
    for number in range(WARM_UP + COUNTED):
        if number == WARM_UP:
            passed.clear()
        began, used = time.perf_counter(), time.process_time()
        step(given)
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
    calls: Counter[str] = Counter()
    sent = 0.0
    for name, size, group in passed:
        if group > 1 and size > 64:  # a norm or a flag is no traffic
            calls[name] += 1
            sent += size * (group - 1) / group * (2 if name == "all_reduce" else 1)
    report = {"calls": {name: round(number / COUNTED) for name, number in calls.items()}, "sent": sent / COUNTED}
    report |= {"step_s": statistics.median(seconds[WARM_UP:]), "cpu_s": statistics.median(cpu[WARM_UP:])}
    torch.distributed.barrier()
    print(json.dumps(report))
    torch.distributed.destroy_process_group()
    return 0


def listen() -> list[tuple[str, int, int]]:
    """(collective, bytes of its whole vector, ranks) of each call from now on."""
    import torch.distributed as dist

    passed: list[tuple[str, int, int]] = []

    def wrap(name: str, whole: int, keyword: str) -> None:
        function = getattr(dist, name)

        def heard(*given: Any, **named: Any) -> Any:
            tensor = given[whole] if len(given) > whole else named[keyword]
            passed.append((name, tensor.numel() * tensor.element_size(), dist.get_world_size(named.get("group"))))
            return function(*given, **named)

        setattr(dist, name, heard)

    for name in ("all_reduce", "reduce", "broadcast"):
        wrap(name, 0, "tensor")
    wrap("all_gather_into_tensor", 0, "output_tensor")
    wrap("reduce_scatter_tensor", 1, "input")
    return passed


def zero(recipe: Recipe, device: Any, batch: int, to_all: bool) -> Any:
    """One step of crate_dist.training.engine. to_all: each gradient goes to all ranks, as by DeepSpeed's default."""
    from crate_dist.models.build import build_model
    from crate_dist.training import engine

    if to_all:
        engine.RANKS_REDUCED_TO = 0
    trained = engine.Engine(build_model(recipe.model, CLASSES, seed=0), recipe, device, batch, 1)
    return lambda given: trained.step(iter([given]), recipe.optim.lr, 0)


def ddp(recipe: Recipe) -> Any:
    """The same model in torch's DistributedDataParallel: fp32 weights, bf16 by autocast, Lion on every rank."""
    import torch
    import torch.nn.functional as F
    from torch.nn.parallel import DistributedDataParallel

    from crate_dist.data.loader import Normalize
    from crate_dist.models.build import build_model
    from crate_dist.training.optim import build_optimizer, parameter_groups

    bare = build_model(recipe.model, CLASSES, seed=0)
    wrapped = DistributedDataParallel(bare)
    # torch's DDP reduces in C++, past torch.distributed: a hook does the same where it is heard.
    wrapped.register_comm_hook(None, _reduce_aloud)
    optimizer = build_optimizer(parameter_groups(bare, recipe.optim), recipe.optim)
    normalize = Normalize(recipe.images.mean, recipe.images.std, torch.device("cpu"), torch.float32)

    def step(given: tuple[Any, Any]) -> None:
        images, labels = given
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = wrapped(normalize(images))
        F.cross_entropy(logits.float(), labels).backward()
        torch.nn.utils.clip_grad_norm_(bare.parameters(), recipe.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _reduce_aloud(state, bucket):  # type: ignore[no-untyped-def]
    import torch.distributed as dist

    vector = bucket.buffer().div_(dist.get_world_size())
    work = dist.all_reduce(vector, async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])


# --- 3: the model ---------------------------------------------------------------------------------------------------


def model(arguments: argparse.Namespace, recipe: Recipe, count: int) -> None:
    """Weak scaling of nodes of GPUs, ZeRO-2 and DDP."""
    from step import forward_flops

    from crate_dist.models.build import model_config
    from crate_dist.training.engine import RANKS_REDUCED_TO

    work = 3 * forward_flops(model_config(recipe.model, CLASSES)) * arguments.micro_batch
    compute_s = (arguments.step_ms or work / (arguments.mfu * arguments.peak_tflops * 1e12) * 1e3) / 1e3
    network = Network(arguments.inside_gb_s * 1e9, arguments.between_gb_s * 1e9, arguments.latency_us * 1e-6)
    origin = "measured" if arguments.step_ms else f"{arguments.mfu:.0%} of {arguments.peak_tflops:g} TFLOP/s, ASSUMED"
    print(f"model: {arguments.micro_batch} images per GPU in {1e3 * compute_s:.1f} ms ({origin});")
    print(
        f"ring at {arguments.inside_gb_s:g} GB/s in a node, {arguments.between_gb_s:g} GB/s per GPU between nodes, "
        f"{arguments.latency_us:g} µs per message and node;\n"
        f"{arguments.hidden:.0%} of a reduction can hide behind the backward pass, two thirds of the compute\n"
    )
    print("| nodes | GPUs | ZeRO-2: step, ms | images/s | efficiency | DDP: step, ms | efficiency |")
    print("|---|---|---|---|---|---|---|")
    for nodes in (1, 2, 4, 8, 16, 32, 64):
        gpus = nodes * arguments.gpus_per_node
        whole = count * (gpus - 1) / gpus  # what a ring sends of a vector of one byte per parameter
        to_owners = gpus <= RANKS_REDUCED_TO
        seconds = []
        for reduced, gathered in ((2.0 if to_owners else 4.0, 2.0), (8.0, 0.0)):
            reduction = network.ring_s(reduced * whole, gpus, nodes, messages=8 + gpus * (to_owners and gathered > 0))
            seen = reduction - min(arguments.hidden * reduction, compute_s * 2 / 3)
            seconds.append(compute_s + seen + (network.ring_s(gathered * whole, gpus, nodes, 1) if gathered else 0.0))
        zero2, ddp_fp32 = seconds
        print(
            f"| {nodes} | {gpus} | {1e3 * zero2:.1f} | {gpus * arguments.micro_batch / zero2:,.0f} "
            f"| {compute_s / zero2:.1%} | {1e3 * ddp_fp32:.1f} | {compute_s / ddp_fp32:.1%} |"
        )


if __name__ == "__main__":
    sys.exit(main())
