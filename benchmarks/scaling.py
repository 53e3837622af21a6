"""Counts what a step sends, waits for and costs the host on up to 512 ranks, and estimates it on 1 to 64 nodes.

    python benchmarks/scaling.py [--arch crate_base] [--step-ms MS --micro-batch N] [--gpus-per-node 8] …

1. Messages and waits: one process stands among --ranks that are not there (crate_dist/doctor/fake_cluster.py) and takes
   a step of training.engine in each way that it can be set; what passes the process group is counted.
2. Host time: the same with matrices so small that the host is all that counts, in turns with a plain loop of the same
   model, one flat fp32 gradient, one norm and one Lion. CPU seconds, not those of the clock.
3. The model, for nodes of GPUs. Forward is a third of the compute, and backward takes as long for one layer as for
   another. A bucket's reduction starts when its first layer has its gradients and the reduction before is through;
   what is left of the last one after the backward pass is not hidden, nor is the gathering of the weights. A vector
   goes round in as many rings as a node has GPUs, each leaving it by the network card of another one, as NCCL lays
   them. Together they move (n - 1) / n of it per phase, at the rate of a node's links or of its cards, whichever is
   less: give a smaller --between-gb-s where GPUs share a card. A message costs --latency-us for each node of a ring,
   and for each level of an all-reduce's tree. DDP, for comparison, is given the same buckets, in fp32. That what is
   hidden slows the products beside it down is left out. A step takes no less than --host-ms.

--step-ms is one GPU's step without communication, as benchmarks/step.py measures it; without it the counted work at
--mfu of --peak-tflops stands in. --model-only leaves the first two away.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import measuring  # isort: skip
from crate_dist.config import Recipe, load_recipe
from crate_dist.launching.memory import parameters

if TYPE_CHECKING:
    from crate_dist.models.transformer import Transformer
    from crate_dist.training.engine import Engine

CLASSES = 1000
WIDTH, HEADS, SIDE = 24, 2, 32  # of the model whose host time is measured
WAYS = {"to owners": 1 << 30, "to all": 0}
"""How gradients are reduced -> zero.RANKS_REDUCED_TO."""
NODES = (1, 2, 4, 8, 16, 32, 64)


def main() -> int:
    """Prints the three tables."""
    given = parse()
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    recipe = load_recipe(given.arch, [*given.overrides, "train.precision=bf16"])
    count = parameters(recipe, CLASSES)
    result = {"machine": measuring.machine("torch", "deepspeed"), "arch": given.arch, "parameters": count}
    print(f"{measuring.in_words(result['machine'])}; {given.arch}: {count / 1e6:.2f} M parameters\n")
    if not given.model_only:
        result["messages"] = messages(given, recipe, count)
        result["host"] = host(given, recipe)
    result["model"] = model(given, recipe, count)
    measuring.write_json(given.json, result)
    return 0


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = measuring.parser(__doc__, measuring.arch("crate_base"), measuring.JSON)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 128, 512], metavar="N", help="%(default)s")
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="of host time [%(default)s]")
    parser.add_argument("--model-only", action="store_true", help="the third table alone")
    given = parser.add_argument_group("assumptions of the model")
    given.add_argument("--micro-batch", type=int, default=128, metavar="N", help="images per GPU [%(default)s]")
    given.add_argument("--step-ms", type=float, metavar="MS", help="measured step of one GPU [from --mfu]")
    given.add_argument("--mfu", type=float, default=0.4, help="share of --peak-tflops [%(default)s]")
    given.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 of an H100 [%(default)s]")
    given.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="[%(default)s]")
    given.add_argument("--inside-gb-s", type=float, default=300.0, help="ring within a node [%(default)s]")
    given.add_argument("--between-gb-s", type=float, default=35.0, help="per GPU between nodes [%(default)s]")
    given.add_argument("--latency-us", type=float, default=20.0, help="per message and node or level [%(default)s]")
    given.add_argument("--host-ms", type=float, default=0.0, metavar="MS", help="of the host for a step [%(default)s]")
    return parser.parse_args()


# --- 1: messages ----------------------------------------------------------------------------------------------------


def messages(given: argparse.Namespace, recipe: Recipe, count: int) -> list[dict[str, Any]]:
    """Prints and returns what passes the process group in a step of one micro-batch, and what the host waits for."""
    import torch

    from crate_dist.doctor.contestants import synthetic
    from crate_dist.doctor.fake_cluster import counted

    found, batch = [], synthetic(1, SIDE, 0, torch.device("cpu"))

    def rows() -> Iterator[list[object]]:
        for ranks in given.ranks:
            for way in WAYS:
                with engine_among(ranks, way, recipe) as engine:
                    engine.step(iter([batch]), 1e-4, 0)  # the first has none before it, which the host would look at
                    with counted() as seen:
                        engine.step(iter([batch]), 1e-4, 1)
                large = [message for message in seen.messages if message.bytes > 64]  # not a norm
                calls = ", ".join(f"{number} {kind}" for kind, number in seen.kinds().items())
                waits = ", ".join(f"{number} {what}" for what, number in seen.waits.items()) or "none"
                reductions = [message.bytes / 1e6 for message in large if "reduce" in message.kind]
                row = [ranks, way, calls, min(reductions), sum(message.sent for message in large) / count, waits]
                found.append(dict(zip(head, row, strict=True)))
                yield row

    head = ["ranks", "reduced", "messages", "smallest reduction, MB", "bytes per parameter, sent", "waits"]
    measuring.print_table(head, rows(), "d s s .2f .2f s")
    return found


@contextlib.contextmanager
def engine_among(ranks: int, way: str, recipe: Recipe, narrow: bool = False) -> Iterator[Engine]:
    """Makes an engine on one of `ranks`, with small images; narrow: and with small matrices, as many of them."""
    import torch

    from crate_dist.doctor.fake_cluster import fake_cluster
    from crate_dist.training import zero
    from crate_dist.training.engine import Engine

    train = recipe.train.model_copy(update={"global_batch": ranks})
    smallest = 1 if narrow else zero.SMALLEST_BUCKET
    settings = patch.multiple(zero, RANKS_REDUCED_TO=WAYS[way], SMALLEST_BUCKET=smallest)
    with settings, fake_cluster(ranks, rank=ranks // 3):
        model = with_small_images(recipe, narrow)
        yield Engine(model, recipe.model_copy(update={"train": train}), torch.device("cpu"), 1, 1)


def with_small_images(recipe: Recipe, narrow: bool) -> Transformer:
    """Returns the recipe's model for images of SIDE pixels; narrow: and with matrices of WIDTH."""
    from crate_dist.models.build import model_config
    from crate_dist.models.transformer import Transformer

    config = dataclasses.replace(model_config(recipe.model, CLASSES), image_size=SIDE)
    return Transformer(dataclasses.replace(config, dim=WIDTH, heads=HEADS) if narrow else config)


# --- 2: host time ---------------------------------------------------------------------------------------------------


def host(given: argparse.Namespace, recipe: Recipe) -> list[dict[str, Any]]:
    """Prints and returns the CPU milliseconds of a step, of the plain loop, and the median of their ratio."""
    import torch

    from crate_dist.doctor.contestants import synthetic

    torch.set_num_threads(1)
    found = []
    batch = synthetic(1, SIDE, 0, torch.device("cpu"))

    def rows() -> Iterator[list[object]]:
        for ranks in given.ranks:
            for way in WAYS:
                with engine_among(ranks, way, recipe, narrow=True) as engine:
                    plain = plain_loop(recipe, engine)
                    turns = {
                        "engine": lambda engine=engine: measuring.cost(engine.step, iter([batch]), 1e-4, 0),
                        "plain": lambda plain=plain: measuring.cost(plain, batch),
                    }
                    costs = measuring.in_turns(turns, given.rounds, warm_up=5)
                ours, theirs = ([1e3 * cost.cpu_s for cost in costs[name]] for name in turns)
                ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
                row = [ranks, way, statistics.median(ours), statistics.median(theirs), ratio]
                found.append(dict(zip(head, row, strict=True)))
                yield row

    head = ["ranks", "reduced", "step, ms", "plain loop, ms", "ratio"]
    measuring.print_table(head, rows(), "d s .2f .2f .2f")
    return found


def plain_loop(recipe: Recipe, engine: Engine) -> Callable[[tuple[Any, Any]], None]:
    """Returns the least that a step of the same model does, on one rank."""
    import torch
    import torch.nn.functional as F

    from crate_dist.training.optim import build_optimizer

    model = with_small_images(recipe, narrow=True).bfloat16()
    masters = torch.nn.Parameter(torch.cat([p.detach().float().view(-1) for p in model.parameters()]))
    optimizer: Any = build_optimizer([{"params": [masters], "weight_decay": 0.1}], recipe.optim)

    def step(given: tuple[Any, Any]) -> None:
        F.cross_entropy(model(engine._normalize(given[0])).float(), given[1]).backward()
        masters.grad = torch.cat([p.grad.view(-1) for p in model.parameters() if p.grad is not None]).float()
        optimizer.grad_scale = (masters.grad.norm() + 1e-6).clamp(min=1.0)
        optimizer.step()
        masters.detach().bfloat16()
        for parameter in model.parameters():
            parameter.grad = None

    return step


# --- 3: the model ---------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A bucket: parameters [first, last) of the flat vector, and how much of the backward pass its gradients take."""

    first: int
    last: int
    ready: float


def parts(recipe: Recipe) -> list[Part]:
    """Cuts the model's gradients as the engine does, the first to be ready first."""
    import torch

    from crate_dist.models.build import model_config
    from crate_dist.models.transformer import Transformer
    from crate_dist.training.buckets import cut
    from crate_dist.training.zero import BUCKETS, SMALLEST_BUCKET

    with torch.device("meta"):
        model = Transformer(model_config(recipe.model, CLASSES))
    named = [(name.split("."), p.numel()) for name, p in model.named_parameters()]
    starts = [0, *itertools.accumulate(size for _, size in named)]
    depth, found = model.config.depth, []
    for first, last in cut([size for _, size in named], max(starts[-1] // BUCKETS, SMALLEST_BUCKET)):
        layers = [int(words[1]) if words[0] == "layers" else depth for words, _ in named[first:last]]
        found.append(Part(starts[first], starts[last], 1.0 if first == 0 else 1 - min(layers) / depth))
    return found


def model(given: argparse.Namespace, recipe: Recipe, count: int) -> list[dict[str, Any]]:
    """Prints and returns the weak scaling of nodes of GPUs: ZeRO-2 in both ways, and DDP with fp32 gradients."""
    from crate_dist.models.build import model_config
    from crate_dist.models.costs import step_flops
    from crate_dist.training.zero import RANKS_REDUCED_TO

    work = step_flops(model_config(recipe.model, CLASSES), given.micro_batch)
    compute_s = (given.step_ms or work / (given.mfu * given.peak_tflops * 1e12) * 1e3) / 1e3
    origin = "measured" if given.step_ms else f"{given.mfu:.0%} of {given.peak_tflops:g} TFLOP/s, ASSUMED"
    print(
        f"model: {given.micro_batch} images per GPU in {1e3 * compute_s:.1f} ms ({origin});\n"
        f"rings at {given.inside_gb_s:g} GB/s in a node, {given.between_gb_s:g} GB/s per GPU between nodes, "
        f"{given.latency_us:g} µs per message and node or level; the host takes {given.host_ms:g} ms;\n"
        f"to owners up to {RANKS_REDUCED_TO} ranks, to all beyond; "
        "hidden: the share of the reductions' time that is behind the backward pass\n"
    )
    buckets, found = parts(recipe), []
    for nodes in NODES:
        gpus = nodes * given.gpus_per_node
        row: dict[str, Any] = {"nodes": nodes, "GPUs": gpus}
        for way, wide in (("to owners", 2), ("to all", 2), ("DDP", 4)):
            reduced, left = reductions_s(given, buckets, compute_s, nodes, wide, count if way == "to owners" else 0)
            gathered = 0.0 if way == "DDP" else ring_s(given, 2 * count, nodes)
            step_s = max(compute_s + left + gathered, given.host_ms / 1e3)
            row |= {f"{way}: step, ms": 1e3 * step_s, "efficiency " + way: compute_s / step_s}
            row |= {"hidden " + way: 1 - left / reduced}
        found.append(row)
    measuring.print_table(list(found[0]), (row.values() for row in found), "d d" + " .1f .1% .0%" * 3)
    return found


def reductions_s(
    given: argparse.Namespace, buckets: list[Part], compute_s: float, nodes: int, wide: int, owned: int
) -> tuple[float, float]:
    """Returns the seconds of all reductions of a step, and those that are left when its backward pass is through.

    wide: bytes per gradient. owned: parameters that are partitioned, where each owner has a message; 0: to all
    """
    taken = end = 0.0
    for bucket in buckets:
        size = wide * (bucket.last - bucket.first)
        if owned:
            partition = math.ceil(owned / (nodes * given.gpus_per_node))
            owners = (bucket.last - 1) // partition - bucket.first // partition + 1
            seconds = ring_s(given, size, nodes, messages=owners)
        else:
            levels = 1 + math.ceil(math.log2(nodes))
            seconds = 2 * (ring_s(given, size, nodes, messages=0) + levels * given.latency_us * 1e-6)
        taken += seconds
        end = max(end, compute_s * (1 + 2 * bucket.ready) / 3) + seconds
    return taken, end - compute_s


def ring_s(given: argparse.Namespace, size: int, nodes: int, messages: int = 1) -> float:
    """Returns the seconds in which rings pass a vector of `size` bytes once, in so many messages."""
    gpus, cards = nodes * given.gpus_per_node, given.gpus_per_node * given.between_gb_s
    slowest = min(given.inside_gb_s, cards) if nodes > 1 else given.inside_gb_s
    return size * (gpus - 1) / gpus / (slowest * 1e9) + messages * given.latency_us * 1e-6 * nodes


if __name__ == "__main__":
    sys.exit(main())
