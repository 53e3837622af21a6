"""Tells the memory that a rank needs for a model's weights by ZeRO-2, from DeepSpeed's own partitions, and without it.

    python benchmarks/memory.py [--arch crate_alpha_large:14 crate_alpha_huge:14] [--ranks 8 32 64] [--precision bf16]

One process stands as the last of ranks that are not there (crate_dist/doctor/fake_cluster.py), has DeepSpeed partition
a model whose weights nobody drew, and takes an optimizer step, so that all is there that a run keeps between its steps;
its tensors are counted. It takes some 6 bytes of memory per parameter itself.

Plain data parallel is the same with nothing partitioned: the whole of master weights, summed gradients and what the
optimizer keeps, in fp32, on every rank. DDP with autocast is torch's: weights, gradients and what the optimizer keeps
in fp32, with gradients that lie in its buckets (gradient_as_bucket_view), by rule. What a pass keeps comes to each of
them, and grows with the micro-batch: models/costs.py.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

import measuring  # isort: skip
from crate_dist.config import Recipe, load_recipe
from crate_dist.models import costs
from crate_dist.models.config import model_config

if TYPE_CHECKING:
    from torch import Tensor

STATES = {"lion": 1, "adamw": 2}


def main() -> int:
    """Prints the table of each architecture."""
    given = parse()
    os.environ |= {"CUDA_VISIBLE_DEVICES": ""}
    facts = measuring.machine("torch", "deepspeed")
    print(f"{measuring.in_words(facts)}\n")
    rows: list[dict[str, Any]] = []
    for name in given.arch:
        arch, _, patch = name.partition(":")
        overrides = [f"model.arch={arch}", f"model.patch_size={patch or 16}", f"optim.name={given.optimizer}"]
        recipe = load_recipe("crate_base", [*overrides, f"train.precision={given.precision}"])
        config = model_config(recipe.model, given.classes)
        count, kept = costs.parameters(config), [costs.kept_bytes(config, n, given.precision) for n in (1, 2)]
        image, once = kept[1] - kept[0], 2 * kept[0] - kept[1]
        print(
            f"{name}: {count / 1e6:.2f} M parameters, {given.optimizer}, {given.precision}; a pass keeps "
            f"{image / 1e6:,.0f} MB per image and {once / 1e6:,.0f} MB whatever their number\n"
        )
        rows += (found := list(rows_of(recipe, given.classes, given.ranks, count)))
        head = [
            "ranks",
            "weights, GB",
            "gradients, GB",
            "partition, GB",
            "ZeRO-2, GB",
            "plain, GB",
            "DDP with autocast, GB",
        ]
        print_rows(head, found)
    measuring.write_json(
        given.json, {"machine": facts, "optimizer": given.optimizer, "precision": given.precision, "rows": rows}
    )
    return 0


def print_rows(head: list[str], rows: Iterable[dict[str, Any]]) -> None:
    """Prints one architecture's rows, in GB."""
    parts = ("weights", "gradients", "partition", "zero2", "plain", "ddp")
    measuring.print_table(
        head, ([row["ranks"], *(row[part] / 1e9 for part in parts)] for row in rows), "d" + " .2f" * 6
    )


def rows_of(recipe: Recipe, classes: int, ranks: list[int], count: int) -> Iterator[dict[str, Any]]:
    """Yields what a rank holds, in bytes, at each number of ranks."""
    for world_size in ranks:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:  # which gives all memory back
            held = process.submit(partitioned, recipe, classes, world_size).result()
        whole = held["weights"] + held["gradients"]
        yield {
            "arch": recipe.model.arch,
            "patch_size": recipe.model.patch_size,
            "parameters": count,
            "ranks": world_size,
            **held,
            "zero2": whole + held["partition"],
            "plain": whole + held["partition"] * world_size,
            "ddp": 4 * count * (2 + STATES[recipe.optim.name]),
        }


def partitioned(recipe: Recipe, classes: int, world_size: int) -> dict[str, int]:
    """Returns the bytes of weights, gradients and partition that the last of `world_size` ranks holds after a step."""
    import torch

    from crate_dist.doctor.fake_cluster import fake_cluster
    from crate_dist.models.transformer import Transformer
    from crate_dist.training.optim import build_optimizer, parameter_groups
    from crate_dist.training.zero import initialize

    with torch.device("meta"):
        model = Transformer(model_config(recipe.model, classes))
    if recipe.train.precision == "bf16":
        model.bfloat16()
    model.to_empty(device="cpu")  # memory that nobody writes to is none
    with fake_cluster(world_size, rank=world_size - 1):
        optimizer = build_optimizer(parameter_groups(model, recipe.optim), recipe.optim)
        _, zero = initialize(model, optimizer, recipe, 1, 1)
        zero.step()
        states = [t for state in zero.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        return {
            "weights": _bytes(zero.bit16_groups_flat),
            "gradients": _bytes(bucket.gradient for bucket in zero._buckets),
            "partition": _bytes([*zero.single_partition_of_fp32_groups, *zero._sums, *states]),
        }


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Counts the bytes of what tensors lie in, each memory once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = measuring.parser(__doc__, measuring.JSON)
    parser.add_argument(
        "--arch",
        nargs="+",
        default=["crate_alpha_large:14", "crate_alpha_huge:14"],
        metavar="NAME[:PATCH]",
        help="architectures, with the side of their patches if it is not 16 [%(default)s]",
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 64], metavar="N", help="%(default)s")
    parser.add_argument("--optimizer", choices=sorted(STATES), default="adamw", help="[%(default)s]")
    parser.add_argument(
        "--precision",
        choices=["autocast", "bf16"],
        default="autocast",
        help="of the run: bf16 holds weights and gradients in half the bytes [%(default)s, as the recipes of CRATE-α]",
    )
    parser.add_argument("--classes", type=int, default=1000, metavar="N", help="[%(default)s]")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
