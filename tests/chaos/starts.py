"""Starts the loader of an evaluation, thousands of times, in ranks that are as busy as they ever are at that moment.

    python -m tests.chaos.starts                  2,000 starts
    python -m tests.chaos.starts --starts 200     fewer of them

Each of two ranks has a loader of training batches at work and a reduction in flight whenever it starts workers, a
watchdog that asks the store, a thread that takes collectives as the saver does and one that writes curves, while other
processes keep every core busy. A start that stands still ends the program, with the stacks of all threads of all
processes.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from crate_dist.data.index import ShardIndex
from crate_dist.data.loader import Share, TrainLoader, eval_loader
from crate_dist.data.order import Order
from crate_dist.data.transforms import EvalTransform, TrainTransform
from crate_dist.data.workers import open_server
from crate_dist.distributed import gather_objects, init_distributed
from crate_dist.training.interrupt import Interrupt
from crate_dist.training.tensorboard import Curves
from crate_dist.training.watchdog import Watchdog
from crate_dist.world import free_port
from tests.chaos.stacks import answer_with_stacks, leave_stacks
from tests.conftest import casts, write_split
from tests.ranks import local_world, rank_environment

RANKS, WORKERS = 2, 2
PATIENCE_S = 60.0
"""A start takes some tens of milliseconds."""


def main(argv: list[str] | None = None) -> int:
    """Gives 1 when a start stood still."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.starts", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--starts", type=int, default=2000, metavar="N", help="of all ranks together [%(default)s]")
    parser.add_argument("--idle", action="store_true", help="no other processes: to see how long a start takes")
    arguments = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="starts-"))
    write_split(folder / "val", casts(37, seed=2), shard_samples=20, classes=4)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crate_dist.train", "tests.chaos.starts"])
    rounds, port = -(-arguments.starts // RANKS), free_port()
    busy = [] if arguments.idle else [context.Process(target=_spin, daemon=True) for _ in range(os.cpu_count() or 1)]
    ranks = [context.Process(target=_rank, args=(rank, port, rounds, folder)) for rank in range(RANKS)]
    for process in (*busy, *ranks):
        process.start()
    stood_still = _watch(ranks, folder)
    for process in (*ranks, *busy):
        process.kill()
    done = [_times(folder, rank) for rank in range(RANKS)]
    seconds = [value for times in done for value in times]
    good = not stood_still and len(seconds) >= arguments.starts
    sys.stdout.write(
        f"{len(seconds)} starts of {WORKERS} workers, {'none' if good else 'ONE'} of which stood still; to the first "
        f"batch {statistics.median(seconds):.3f} s (median), at most {max(seconds):.3f} s; {folder}\n"
    )
    return 0 if good else 1


def _watch(ranks: list[multiprocessing.context.ForkServerProcess], folder: Path) -> bool:
    """Waits for the end of all ranks. Returns whether they stood still, and leaves their stacks."""
    progress, since = -1, time.monotonic()
    while any(process.is_alive() for process in ranks):
        now = sum(len(_times(folder, rank)) for rank in range(RANKS))
        if now != progress:
            progress, since = now, time.monotonic()
        elif time.monotonic() - since > PATIENCE_S:
            sys.stdout.write(f"stood still after {now} starts: {leave_stacks([p.pid or 0 for p in ranks], folder)}\n")
            return True
        time.sleep(0.5)
    return False


def _times(folder: Path, rank: int) -> list[float]:
    with contextlib.suppress(FileNotFoundError):
        return [float(line) for line in (folder / f"times-{rank}").read_text().splitlines()]
    return []


def _spin() -> None:
    while True:
        pass


def _rank(rank: int, port: int, rounds: int, folder: Path) -> None:
    answer_with_stacks(folder / f"stacks-{rank}")
    os.environ.update(rank_environment(rank, RANKS, port), CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    open_server()
    world = local_world(rank, RANKS, port)
    device = init_distributed(world)
    index = ShardIndex.load(folder / "val")
    order = Order(index.shard_sizes, seed=1, lanes=4, window=32)
    training = TrainLoader(index, order, Share(rank, RANKS, 12, 6), TrainTransform(32), WORKERS)
    threads = [
        threading.Thread(target=_save, args=(dist.new_group(backend="gloo"),), daemon=True),
        threading.Thread(target=_draw, args=(folder / f"curves-{rank}",), daemon=True),
    ]
    for thread in threads:
        thread.start()
    with Interrupt() as interrupt, Watchdog(world, 10 * PATIENCE_S, folder / f"log-{rank}") as watchdog:
        for number in range(rounds):
            watchdog.beat(f"start {number}")
            next(training)
            interrupt.agreed()
            began, seen, seconds = time.perf_counter(), 0, None
            for batch in eval_loader(index, rank, RANKS, EvalTransform(32, 32), batch=6, workers=WORKERS):
                seconds = seconds or time.perf_counter() - began
                seen += len(batch.labels)
            total = torch.tensor([seen], device=device)
            dist.all_reduce(total)
            assert int(total) == index.num_samples
            with (folder / f"times-{rank}").open("a") as file:
                file.write(f"{seconds}\n")
    os._exit(0)


def _save(group: dist.ProcessGroup) -> None:
    """Collectives beside those of the rank, as the saver's."""
    while True:
        gather_objects(os.urandom(1000), group)
        time.sleep(0.001)


def _draw(folder: Path) -> None:
    folder.mkdir()
    curves = Curves(folder, purge_step=None)
    for step in range(10**9):
        curves.scalars({"curve": float(step)}, step)
        time.sleep(0.001)


if __name__ == "__main__":
    sys.exit(main())
