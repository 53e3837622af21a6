"""Measures the pause of training for a save: ours, and DeepSpeed's own synchronous save_checkpoint, in one run.

    python benchmarks/checkpoint.py [--arch crate_large] [--ranks 1 2 4] [--rounds 5] [--json FILE]

Both save the same state (fp32 master weights and Lion's momentum, partitioned by ZeRO-2), in turns, on local ranks and
to the same disk. Ours stands still for the copy to host memory; writing, digests, fsync and the rename go on beside.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # so that what a bare Python lacks is told by crate_dist
from crate_dist.config import load_recipe
from crate_dist.launching.ranks import rank_environment
from crate_dist.world import free_port

COLUMNS = ("DeepSpeed save", "our stall", "our save in all", "DeepSpeed load", "our load")


def main() -> int:
    """Prints one row of medians per number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="crate_large", help="recipe in configs/ [%(default)s]")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="saves of each kind, after one to warm up")
    parser.add_argument("--folder", type=Path, help="where to write and remove checkpoints [the temporary folder]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    arguments = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.platform()}, Python {platform.python_version()}"
    print(f"machine: {machine}; {arguments.arch}; medians of {arguments.rounds} rounds, seconds\n")
    print("| ranks | state, MB | " + " | ".join(COLUMNS) + " | stall / DeepSpeed save |\n|" + "---|" * 8)
    rows = []
    for ranks in arguments.ranks:
        row = measure_on(ranks, arguments.arch, arguments.rounds, arguments.folder)
        rows.append(row)
        ratio = row["our stall"] / row["DeepSpeed save"]
        print(
            f"| {ranks} | {row['bytes'] / 1e6:,.0f} | "
            + " | ".join(f"{row[name]:.2f}" for name in COLUMNS)
            + f" | {ratio:.2f} |",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "arch": arguments.arch, "rows": rows}, indent=1))
    return 0


def measure_on(ranks: int, arch: str, rounds: int, folder: Path | None) -> dict[str, Any]:
    """Medians over the rounds; of each round the slowest rank counts."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    port = free_port()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        processes = [
            context.Process(target=as_rank, args=(rank, ranks, port, arch, rounds, Path(place), queue))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        results = [queue.get() for _ in processes]
        for process in processes:
            process.join()
    times = {
        name: statistics.median(max(result[name][i] for result in results) for i in range(rounds)) for name in COLUMNS
    }
    return {"ranks": ranks, "bytes": sum(result["bytes"] for result in results), **times}


def as_rank(rank: int, ranks: int, port: int, arch: str, rounds: int, place: Path, queue: Any) -> None:
    """One rank: an engine with a full optimizer state, saved and loaded in turns."""
    os.environ.update(rank_environment(rank, ranks, port))
    import torch
    import torch.distributed as dist

    from crate_dist.checkpoint.format import Progress
    from crate_dist.checkpoint.loading import find_newest
    from crate_dist.checkpoint.saving import Saver
    from crate_dist.distributed import init_distributed
    from crate_dist.models.build import build_model
    from crate_dist.training.engine import Engine
    from crate_dist.world import detect_world

    logging.disable(logging.WARNING)
    world = detect_world()
    device = init_distributed(world)
    recipe = load_recipe(arch)
    engine = Engine(build_model(recipe.model, 1000, seed=0), recipe, device, 1, recipe.train.global_batch // ranks)
    state = engine.state()
    for part in state["exp_avg"]:
        part.normal_()  # zeros would compress in some file systems
    saver = Saver(place / "ours", engine.layouts, world, keep=1, max_failures=1)
    times: dict[str, list[float]] = {name: [] for name in COLUMNS}

    def timed(name: str, began: float, count: bool) -> None:
        if count:
            times[name].append(time.perf_counter() - began)

    for number in range(rounds + 1):
        count = number > 0
        dist.barrier()
        began = time.perf_counter()
        engine._engine.save_checkpoint(str(place / "deepspeed"), tag=str(number))
        timed("DeepSpeed save", began, count)
        dist.barrier()
        began = time.perf_counter()
        engine._engine.load_checkpoint(str(place / "deepspeed"), tag=str(number))
        timed("DeepSpeed load", began, count)
        dist.barrier()
        began = time.perf_counter()
        saver.save(engine.state(), Progress(step=number))
        timed("our stall", began, count)
        saver.wait()
        timed("our save in all", began, count)
        dist.barrier()
        began = time.perf_counter()
        found = find_newest(place / "ours", world)
        assert found is not None
        engine.load(found)
        timed("our load", began, count)
        dist.barrier()
        if rank == 0:
            shutil.rmtree(place / "deepspeed")
    bytes_here = sum(part.numel() * part.element_size() for parts in state.values() for part in parts)
    queue.put({**times, "bytes": bytes_here})
    dist.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
