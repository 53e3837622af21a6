"""Measures the pause of training for a save: ours, and DeepSpeed's own synchronous save_checkpoint, in one run.

    python benchmarks/checkpoint.py [--arch crate_large] [--ranks 1 2 4] [--rounds 5] [--json FILE]

Both save the same state (fp32 master weights and Lion's momentum, partitioned by ZeRO-2), in turns, on local ranks and
to the same disk. Ours stands still for the copy to host memory; writing, digests, fsync and the rename go on beside.
"""

from __future__ import annotations

import logging
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measuring  # isort: skip
from crate_dist.config import load_recipe
from crate_dist.world import World

COLUMNS = ("DeepSpeed save", "our stall", "our save in all", "DeepSpeed load", "our load")


def main() -> int:
    """Prints one row of medians per number of ranks."""
    parser = measuring.parser(__doc__, measuring.arch("crate_large"), measuring.JSON)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="saves of each kind, after one to warm up")
    parser.add_argument("--folder", type=Path, help="where to write and remove checkpoints [the temporary folder]")
    given = parser.parse_args()
    machine, rows = measuring.machine("torch", "deepspeed"), []
    print(f"{measuring.in_words(machine)}; {given.arch}; medians of {given.rounds} rounds, seconds\n")

    def measured() -> Iterator[list[object]]:
        for ranks in given.ranks:
            with tempfile.TemporaryDirectory(dir=given.folder) as place:
                found = measuring.on_ranks(ranks, as_rank, given.arch, given.overrides, given.rounds, Path(place))
            slowest = [
                {name: max(rank[name] for rank in times) for name in COLUMNS} for times in zip(*found, strict=True)
            ]
            row = {name: statistics.median(times[name] for times in slowest) for name in COLUMNS}
            state = sum(rank[0]["bytes"] for rank in found)
            rows.append({"ranks": ranks, "bytes": state, **row})
            yield [ranks, state / 1e6, *row.values(), row["our stall"] / row["DeepSpeed save"]]

    measuring.print_table(["ranks", "state, MB", *COLUMNS, "stall / DeepSpeed save"], measured(), "d ,.0f" + " .2f" * 6)
    measuring.write_json(given.json, {"machine": machine, "arch": given.arch, "rows": rows})
    return 0


def as_rank(
    world: World, device: Any, arch: str, overrides: list[str], rounds: int, place: Path
) -> list[dict[str, float]]:
    """Saves and loads an engine with a full optimizer state; returns seconds of each round, and this rank's bytes."""
    import torch.distributed as dist

    from crate_dist.checkpoint.format import Progress
    from crate_dist.checkpoint.loading import find_newest
    from crate_dist.checkpoint.saving import Saver
    from crate_dist.models.build import build_model
    from crate_dist.training.engine import Engine

    logging.disable(logging.WARNING)
    recipe = load_recipe(arch, overrides)
    batch = recipe.train.global_batch // world.world_size
    engine = Engine(build_model(recipe.model, 1000, seed=0), recipe, device, 1, batch)
    state = engine.state()
    for part in state["exp_avg"]:
        part.normal_()  # zeros would compress in some file systems
    size = sum(part.numel() * part.element_size() for parts in state.values() for part in parts)
    saver = Saver(place / "ours", engine.layouts, world, keep=1, max_failures=1)
    deepspeed = str(place / "deepspeed")

    def timed(work: Callable[[], object]) -> float:
        dist.barrier()
        return measuring.cost(work).wall_s

    def load_ours() -> None:
        found = find_newest(place / "ours", world)
        assert found is not None
        engine.partitions.load(found)

    def save_and_load(number: int) -> dict[str, float]:
        times = {
            "bytes": size,
            "DeepSpeed save": timed(lambda: engine._engine.save_checkpoint(deepspeed, tag=str(number))),
            "DeepSpeed load": timed(lambda: engine._engine.load_checkpoint(deepspeed, tag=str(number))),
            "our stall": timed(lambda: saver.save(engine.state(), Progress(step=number))),
        }
        times["our save in all"] = times["our stall"] + measuring.cost(saver.wait).wall_s
        times["our load"] = timed(load_ours)
        dist.barrier()
        if world.is_main:
            shutil.rmtree(deepspeed)
        return times

    return [save_and_load(number) for number in range(rounds + 1)][1:]


if __name__ == "__main__":
    sys.exit(main())
