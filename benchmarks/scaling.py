"""Counts what the step sends, and estimates it on 1 to 64 nodes by a model that states its assumptions.

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
import os
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import measuring  # isort: skip
from crate_dist.config import Recipe, load_recipe
from crate_dist.launching.memory import parameters
from crate_dist.world import World

CLASSES = 1000
WARM_UP, COUNTED = 2, 3


def main() -> int:
    """Prints the three tables."""
    given = parse()
    recipe = load_recipe(given.arch, given.overrides)
    count = parameters(recipe, CLASSES)
    result = {"machine": measuring.machine("torch", "deepspeed"), "arch": given.arch, "parameters": count}
    print(f"{measuring.in_words(result['machine'])}; {given.arch}: {count / 1e6:.2f} M parameters\n")
    if not given.model_only:
        result["measured"] = measured(given, count)
    result["model"] = model(given, recipe, count)
    measuring.write_json(given.json, result)
    return 0


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = measuring.parser(__doc__, measuring.arch("crate_base"), measuring.JSON)
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
    return parser.parse_args()


# --- 1 and 2: local ranks -------------------------------------------------------------------------------------------


def measured(given: argparse.Namespace, count: int) -> list[dict[str, Any]]:
    """Prints and returns the traffic and the weak scaling of local processes."""
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # of the ranks
    found = []

    def rows() -> Iterator[list[object]]:
        for kind in ("zero-2", "zero-2 to all", "ddp"):
            for ranks in (1, 2, 4):
                said = measuring.on_ranks(ranks, as_rank, kind, given)[0]
                found.append({"kind": kind, "ranks": ranks, **said})
                calls = ", ".join(f"{number} {name}" for name, number in said["calls"].items()) or "none"
                yield [kind, ranks, calls, said["sent"] / count, said["step_s"], said["cpu_s"]]

    head = ["", "ranks", "collectives per step", "bytes per parameter, sent by a rank", "step, s", "CPU s of a rank"]
    measuring.print_table(head, rows(), "s d s .2f .2f .2f")
    print(f"{len(os.sched_getaffinity(0))} cores, one thread per rank: more ranks than cores share them.\n")
    return found


def as_rank(world: World, device: Any, kind: str, given: argparse.Namespace) -> dict[str, Any]:
    """Takes steps as one rank and returns what passed, and the medians of their seconds."""
    passed = listen()  # before anything binds the functions
    from crate_dist.doctor.contestants import ours, synthetic
    from crate_dist.training import engine

    settings = [f"train.global_batch={given.local_batch * world.world_size}", "train.precision=bf16", *given.overrides]
    recipe = load_recipe(given.arch, settings)
    if kind == "zero-2 to all":
        engine.RANKS_REDUCED_TO = 0  # each gradient goes to all ranks, as by DeepSpeed's default
    step = ddp(recipe) if kind == "ddp" else ours(recipe, device, given.local_batch)
    batch = synthetic(given.local_batch, recipe.model.image_size, world.rank, device)
    for _ in range(WARM_UP):
        step(batch)
    passed.clear()
    costs = [measuring.cost(step, batch) for _ in range(COUNTED)]
    calls: Counter[str] = Counter()
    sent = 0.0
    for name, size, group in passed:
        if group > 1 and size > 64:  # a norm or a flag is no traffic
            calls[name] += 1
            sent += size * (group - 1) / group * (2 if name == "all_reduce" else 1)
    step_s, cpu_s = map(statistics.median, zip(*costs, strict=True))
    per_step = {name: round(number / COUNTED) for name, number in calls.items()}
    return {"calls": per_step, "sent": sent / COUNTED, "step_s": step_s, "cpu_s": cpu_s}


def listen() -> list[tuple[str, int, int]]:
    """Returns the list to which each call from now on adds (collective, bytes of its whole vector, ranks)."""
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


def ddp(recipe: Recipe) -> Any:
    """Returns a step of the same model in torch's DistributedDataParallel: fp32 weights, autocast to bf16, Lion."""
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


def model(given: argparse.Namespace, recipe: Recipe, count: int) -> list[dict[str, float]]:
    """Prints and returns the weak scaling of nodes of GPUs, ZeRO-2 and DDP."""
    from crate_dist.models.build import model_config
    from crate_dist.models.flops import forward_flops
    from crate_dist.training.engine import RANKS_REDUCED_TO

    work = 3 * forward_flops(model_config(recipe.model, CLASSES), given.micro_batch)
    compute_s = (given.step_ms or work / (given.mfu * given.peak_tflops * 1e12) * 1e3) / 1e3
    origin = "measured" if given.step_ms else f"{given.mfu:.0%} of {given.peak_tflops:g} TFLOP/s, ASSUMED"
    print(
        f"model: {given.micro_batch} images per GPU in {1e3 * compute_s:.1f} ms ({origin});\n"
        f"ring at {given.inside_gb_s:g} GB/s in a node, {given.between_gb_s:g} GB/s per GPU between nodes, "
        f"{given.latency_us:g} µs per message and node;\n"
        f"{given.hidden:.0%} of a reduction can hide behind the backward pass, two thirds of the compute\n"
    )

    def ring_s(sent: float, gpus: int, nodes: int, messages: int) -> float:
        """Seconds to send these bytes per rank; the slowest link of the ring decides."""
        if gpus == 1:
            return 0.0
        slowest = given.between_gb_s if nodes > 1 else given.inside_gb_s
        return sent / (slowest * 1e9) + messages * given.latency_us * 1e-6 * nodes

    found = []
    for nodes in (1, 2, 4, 8, 16, 32, 64):
        gpus = nodes * given.gpus_per_node
        whole = count * (gpus - 1) / gpus  # what a ring sends of a vector of one byte per parameter
        to_owners = gpus <= RANKS_REDUCED_TO
        seconds = []
        for reduced, gathered in ((2.0 if to_owners else 4.0, 2.0), (8.0, 0.0)):
            reduction = ring_s(reduced * whole, gpus, nodes, messages=8 + gpus * (to_owners and gathered > 0))
            seen = reduction - min(given.hidden * reduction, compute_s * 2 / 3)
            seconds.append(compute_s + seen + (ring_s(gathered * whole, gpus, nodes, 1) if gathered else 0.0))
        found.append({"nodes": nodes, "gpus": gpus, "zero2_s": seconds[0], "ddp_s": seconds[1]})
    measuring.print_table(
        ["nodes", "GPUs", "ZeRO-2: step, ms", "images/s", "efficiency", "DDP: step, ms", "efficiency"],
        (
            [nodes, gpus, 1e3 * zero2, gpus * given.micro_batch / zero2, compute_s / zero2, 1e3 * ddp, compute_s / ddp]
            for nodes, gpus, zero2, ddp in (row.values() for row in found)
        ),
        "d d .1f ,.0f .1% .1f .1%",
    )
    return found


if __name__ == "__main__":
    sys.exit(main())
