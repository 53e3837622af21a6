"""The order of samples, counted: planning time and memory, reads per node and shard, quality of the shuffle.

    python benchmarks/order.py [--json FILE]

Counts and simulates with crate_dist.data.order alone; no data are read.
"""

from __future__ import annotations

import statistics
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import measuring  # isort: skip
import numpy as np

from crate_dist.data.order import Order, permutation

IMAGENET = (1_281_167, 1_282)
GLOBAL_BATCH = 2048
NODES, RANKS_PER_NODE = 16, 8


def main() -> int:
    """Prints the three tables."""
    given = measuring.parser(__doc__, measuring.JSON).parse_args()
    results: dict[str, Any] = {"machine": measuring.machine("numpy")}
    print(f"{measuring.in_words(results['machine'])}\n")
    default = ("lanes 64, window 4096 (default)", 64, 4096)
    kinds = [("ImageNet-1K", *IMAGENET), ("ImageNet-21K", 14_197_122, 14_198), ("a billion", 1_000_000_000, 1_000_000)]
    show(results, "planning an epoch, per rank", planning, *kinds)
    title = f"reads of ImageNet's shards, {NODES} nodes x {RANKS_PER_NODE} ranks, batch {GLOBAL_BATCH}"
    whole = ("lanes 1, window = all", 1, 1 << 30)
    show(results, title, locality, default, lanes_and_window(128, 4096), lanes_and_window(64, 16384), whole)
    full = ("full permutation", 0, 0)
    title = "quality of the shuffle, ImageNet's shape"
    show(results, title, shuffle, default, lanes_and_window(64, 1000), lanes_and_window(1, 4096), full)
    measuring.write_json(given.json, results)
    return 0


def lanes_and_window(lanes: int, window: int) -> tuple[str, int, int]:
    """Returns a case and its name."""
    return f"lanes {lanes}, window {window}", lanes, window


def show(results: dict[str, Any], title: str, count: Callable[..., dict[str, Any]], *cases: tuple[object, ...]) -> None:
    """Counts each case, prints the table and adds it to the results."""
    print(f"**{title}**\n")
    rows = results[count.__name__] = [count(*case) for case in cases]
    measuring.print_table(list(rows[0]), (row.values() for row in rows))


def planning(name: str, samples: int, shards: int) -> dict[str, Any]:
    """Measures time and memory until a rank knows its first samples of 5 epochs, and those of a batch after that."""
    sizes = shard_sizes(samples, shards)
    first, steady = [], []

    def take(order: Order, step: int) -> None:
        order.samples(order.batch_positions(step, GLOBAL_BATCH)[: GLOBAL_BATCH // (NODES * RANKS_PER_NODE)])

    def begin(epoch: int, step: int) -> Order:
        order = Order(sizes, seed=epoch)
        take(order, step)
        return order

    for epoch in range(5):
        step = -(-epoch * samples // GLOBAL_BATCH)
        first.append(measuring.cost(begin, epoch, step).wall_s)
        order = begin(epoch, step)
        steady += [measuring.cost(take, order, later).wall_s for later in range(step + 1, step + 20)]
    tracemalloc.start()
    order = begin(99, 0)
    for step in range(1, 20):
        take(order, step)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "data": name,
        "samples": f"{samples:,}",
        "shards": f"{shards:,}",
        "epoch begins after, ms": round(1e3 * statistics.median(first), 1),
        "batch, ms": round(1e3 * statistics.median(steady), 2),
        "peak memory, MB": round(peak / 1e6, 1),
    }


def locality(name: str, lanes: int, window: int) -> dict[str, Any]:
    """Counts, over every read of an epoch, the nodes that read a shard and the shards that a node is in at a time."""
    order = Order(shard_sizes(*IMAGENET), seed=0, lanes=lanes, window=window)
    ends = np.cumsum(order.shard_sizes)
    steps = order.num_samples // GLOBAL_BATCH
    slots = np.concatenate([order.batch_positions(step, GLOBAL_BATCH) for step in range(steps)])
    shards = np.searchsorted(ends, order.samples(slots), side="right").reshape(steps, NODES, -1)
    readers = np.zeros(len(ends), dtype=np.int64)
    in_use, passes = [], []
    for node in range(NODES):
        mine = shards[:, node]
        step_of, shard_of = np.nonzero(touched(mine, len(ends)))
        seen = np.unique(shard_of)
        readers[seen] += 1
        first = np.array([step_of[shard_of == shard].min() for shard in seen])
        last = np.array([step_of[shard_of == shard].max() for shard in seen])
        in_use.append(max(int(((first <= step) & (step <= last)).sum()) for step in range(0, steps, 5)))
        # A pass ends when a shard rests for longer than the window lasts.
        rest = 2 * window * lanes / GLOBAL_BATCH
        for shard in seen:
            passes.append(1 + int((np.diff(np.sort(step_of[shard_of == shard])) > rest).sum()))
    return {
        "order": name,
        "nodes that read a shard, mean": round(float(readers.mean()), 2),
        "most": int(readers.max()),
        "passes of a node over a shard, mean": round(float(np.mean(passes)), 3),
        "shards in use on a node, most": max(in_use),
        "of shards": len(ends),
    }


def touched(shards: np.ndarray, count: int) -> np.ndarray:
    """Returns bool (steps, count): which shards each step touches; shards: (steps, reads)."""
    table = np.zeros((len(shards), count), dtype=bool)
    table[np.arange(len(shards))[:, None], shards] = True
    return table


def shuffle(name: str, lanes: int, window: int) -> dict[str, Any]:
    """Compares with a full permutation, where the conversion did not shuffle: labels in runs of 1,281."""
    samples, shards = IMAGENET
    if lanes:
        order = Order(shard_sizes(samples, shards), seed=0, lanes=lanes, window=window)
        two = [order.samples(np.arange(epoch * samples, (epoch + 1) * samples)) for epoch in (0, 1)]
    else:
        two = [permutation(samples, 0), permutation(samples, 1)]
    ids = two[0]
    labels = ids // 1281
    runs = np.diff(np.flatnonzero(np.concatenate([[True], np.diff(labels) != 0, [True]])))
    place = [np.argsort(epoch) for epoch in two]
    neighbours = np.abs(place[1][two[0][1:]] - place[1][two[0][:-1]]).mean() / (samples / 3)
    batches = labels[: samples // GLOBAL_BATCH * GLOBAL_BATCH].reshape(-1, GLOBAL_BATCH)
    return {
        "order": name,
        "label run length, unshuffled shards": round(float(runs.mean()), 3),
        "distance of neighbours, 1 = random": round(float(np.abs(np.diff(ids)).mean() / (samples / 3)), 3),
        "their distance an epoch later": round(float(neighbours), 3),
        "classes in a batch of 2048": round(float(np.mean([len(np.unique(batch)) for batch in batches[::10]]))),
    }


def shard_sizes(samples: int, shards: int) -> np.ndarray:
    """Returns shards as equal as whole numbers allow."""
    sizes = np.full(shards, samples // shards, dtype=np.int64)
    sizes[: samples % shards] += 1
    return sizes


if __name__ == "__main__":
    sys.exit(main())
