"""The training step: ours, a plain loop around our model, and the published code, on the same batches, in turns.

    python benchmarks/step.py --reference crate=PATH [--precision bf16] [--compile] [--batch 8] [--rounds 10]
    python benchmarks/step.py --passes --arch crate_tiny crate_alpha_base_16_in1k tost_tiny_12 cbt_tiny vit_tiny \\
        --reference crate=PATH alpha=PATH tost=PATH cbt=PATH

--reference names checkouts of the published codes, whose models are imported from there, with the weights of ours: that
both compute the same is seen before anything is timed. ViT's is in CRATE's code; it and ToST's need timm, and are left
out without it. Their SyncBatchNorm becomes BatchNorm2d. Without a checkout, CRATE's formulation in plain PyTorch stands
in, and the others have nothing beside them.

The published loop, as CRATE's main.py has it: fp16 under autocast with GradScaler on a GPU, plain fp32 on a CPU;
zero_grad, forward, loss, backward, Lion from lion-pytorch or torch's AdamW, as the recipe says. Ours is training.engine
on one rank, with ZeRO-2 and all; the plain loop is the same step without DeepSpeed. --compile adds both compiled.

--passes measures the models alone, without loops and optimizers: the forward pass of an evaluation, and forward and
backward as in training. Both are in fp32 on a CPU; on a GPU theirs is under autocast in bf16, ours as --precision says.

Steps are queued without waiting, --queued at a time between two events, and the device's seconds divided by their
number. Ratios are medians over the rounds, of neighbours in time. CPU seconds are those of all threads: what a step
costs on a machine where other work takes part of the wall clock. Peak memory is the device's for the contestant alone;
on a CPU that of a process of its own, of steps alone.

FLOPs are those of models/costs.py: matrix products alone, 2 per multiply-add, in the fewest that the mathematics
needs: one that is saved is not counted as work done. The backward pass counts twice the forward. MFU is that over the
rate of a large matrix product on the same device in the same run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import measuring  # isort: skip
import torch

from crate_dist.config import Recipe
from crate_dist.doctor.ceilings import product_flop_s
from crate_dist.doctor.checkouts import SOURCES, NotImported, difference, source_of, twin
from crate_dist.doctor.contestants import (
    CLASSES,
    OURS,
    PLAIN,
    PUBLISHED,
    Contestant,
    Measured,
    Step,
    alone,
    free,
    passes,
    recipe_for,
    synthetic,
)
from crate_dist.doctor.profiling import profiled
from crate_dist.doctor.timing import Taken, in_turns
from crate_dist.errors import UserError
from crate_dist.models.build import build_model, model_config
from crate_dist.models.costs import forward_flops, step_flops
from crate_dist.world import World

CODES = sorted({source.code for source in SOURCES.values()})
SAME = 1e-4
"""Largest difference of two models' logits, as a share of the largest, that is rounding."""


class Entry(NamedTuple):
    """A row of the table: what it measures, the operations of that, and the row whose ratio is 1."""

    build: Callable[[], Step]
    flops: int
    base: str


def main() -> int:
    """Prints one row per contestant; the published code's has the ratio 1, or the first where there is none."""
    given = parse()
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with alone() as device:
        side = 8192 if device.type == "cuda" else 2048
        rate = product_flop_s(device, side, side, side, torch.float32 if given.precision == "fp32" else torch.bfloat16)
        machine = measuring.machine("torch", "timm") | {"threads": torch.get_num_threads()}
        if device.type == "cuda":
            machine["gpu"] = torch.cuda.get_device_name()
        print(f"{measuring.in_words(machine)}; batch {given.batch}, {given.precision}")
        print(f"matrix product: {rate / 1e12:.3g} TFLOP/s\n")
        rows = [row for arch in given.arch for row in compare(arch, given, device, rate)]
    measuring.write_json(given.json, {"machine": machine, "rows": rows})
    return 0


def compare(arch: str, given: argparse.Namespace, device: torch.device, rate: float) -> list[dict[str, Any]]:
    """Measures the contestants of one model in turns, and prints their table; returns its rows."""
    reference = same_model(arch, given)
    found = entries(arch, given, device, reference)
    batches = [synthetic(given.batch, recipe_of(arch, given).model.image_size, seed, device) for seed in range(4)]
    running = {name: Measured(entry.build, batches, device) for name, entry in found.items()}
    taken = in_turns(running, device, given.rounds, given.queued)
    rows: list[dict[str, Any]] = []

    def shown() -> Iterator[list[object]]:
        for name, each in taken.items():
            low, median, high = measuring.quartiles([one.device_s for one in each])
            host, cpu = (statistics.median(getattr(one, part) for one in each) for part in ("host_s", "cpu_s"))
            base = taken.get(found[name].base, each)
            faster, cheaper = (_ratio(base, each, part) for part in ("device_s", "cpu_s"))
            peak = running[name].peak
            if peak is None and not given.passes:
                peak = measuring.on_ranks(1, peak_memory, arch, name, given, reference)[0]
            row = {"arch": arch, "name": name, "median_s": median, "quartiles_s": [low, high], "ratio": faster}
            rows.append(row | {"host_s": host, "cpu_s": cpu, "cpu_ratio": cheaper, "peak": peak})
            mfu = found[name].flops / median / rate
            memory = "" if peak is None else f"{peak / 1e9:.2f}"
            speed = [given.batch / median, mfu, faster]
            yield [name, median, f"{low:.4f} to {high:.4f}", *speed, host, cpu, cheaper, memory]

    head = [arch, "median, s", "quartiles", "images/s", "MFU", "ratio", "host, s", "CPU s", "ratio", "peak memory, GB"]
    measuring.print_table(head, shown(), "s .4f s ,.1f .1% .2f .4f .3f .2f s")
    if given.profile:
        name = [name for name in running if OURS in name][-1]
        print(f"{name}: " + profiled(running[name], device).costliest(15))
    running.clear()
    free(device)
    torch.compiler.reset()
    return rows


def _ratio(base: list[Taken], each: list[Taken], part: str) -> float:
    return statistics.median(getattr(b, part) / getattr(one, part) for b, one in zip(base, each, strict=True))


def parse() -> argparse.Namespace:
    """Reads the command line."""
    on_gpu = torch.cuda.is_available()
    parser = measuring.parser(__doc__, measuring.JSON)
    parser.add_argument(
        "--arch", nargs="+", default=["crate_base"], metavar="NAME", help="recipes in configs/ [crate_base]"
    )
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE", help="of the recipes"
    )
    parser.add_argument(
        "--reference",
        nargs="+",
        action="extend",
        type=checkout,
        default=[],
        metavar="CODE=PATH",
        help=f"checkouts of the published codes: {', '.join(CODES)}; a path alone is crate's",
    )
    parser.add_argument("--passes", action="store_true", help="forward, and forward and backward, of the models alone")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if on_gpu else "cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16", "autocast"], help="of ours [bf16 on a GPU, else fp32]")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="images per step [%(default)s]")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="turns of each, after two [%(default)s]")
    parser.add_argument("--queued", type=int, metavar="N", help="steps of a turn [8 on a GPU, else 1]")
    parser.add_argument("--compile", action="store_true", help="ours and the plain loop with torch.compile as well")
    parser.add_argument("--only", metavar="NAME", help="one contestant alone, named as in the table")
    parser.add_argument("--profile", action="store_true", help="name the fifteen most expensive kernels of ours")
    given = parser.parse_args()
    given.reference = dict(given.reference)
    given.precision = given.precision or ("bf16" if given.device == "cuda" else "fp32")
    given.queued = given.queued or (8 if given.device == "cuda" else 1)
    return given


def checkout(text: str) -> tuple[str, Path]:
    """Reads "tost=PATH", or "PATH" for CRATE's code."""
    code, _, path = text.rpartition("=")
    if code not in ("", *CODES):
        raise argparse.ArgumentTypeError(f"{text}: {code} is none of the published codes: {', '.join(CODES)}")
    return code or "crate", Path(path)


def recipe_of(arch: str, given: argparse.Namespace, precision: str = "fp32") -> Recipe:
    """Returns the recipe whose model and optimizer are measured; batch norm takes its statistics over the batch."""
    return recipe_for(arch, given.batch, precision, False, of_all(given))


def of_all(given: argparse.Namespace) -> tuple[str, ...]:
    """Returns what is set in the recipes of all contestants."""
    return (f"train.group={given.batch}", *given.overrides)


def same_model(arch: str, given: argparse.Namespace) -> Path | None:
    """Returns the checkout of this model's published code, where it can be had, and says that both compute the same.

    Raises UserError where they do not.
    """
    model = build_model(recipe_of(arch, given).model, CLASSES, seed=0)
    source = source_of(model.config)
    path: Path | None = given.reference.get(source.code) if source else None
    if source and path:
        try:
            side = model.config.image_size
            images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
            apart = difference(model, twin(model, path), images)
        except NotImported as error:
            print(f"{arch}: no published code beside it: {error}\n")
            return None
        if not apart < SAME:
            raise UserError(f"{arch}: with the same weights, logits differ by {apart:.1g} of the largest from {path}'s")
        print(f"{arch}: logits differ from those of {source.file} by {apart:.0e} of the largest\n")
    return path


def entries(arch: str, given: argparse.Namespace, device: torch.device, reference: Path | None) -> dict[str, Entry]:
    """Returns what is measured of a model, by its name in the table."""
    recipe = recipe_of(arch, given)
    config = model_config(recipe.model, CLASSES)
    source = source_of(config)
    published = reference is not None or (source is SOURCES["CRATE"] and not given.passes)
    if given.passes:
        whose = [PUBLISHED, OURS] if published else [OURS]
        parts = {"forward": forward_flops(config, given.batch), "forward and backward": step_flops(config, given.batch)}
        found = {
            f"{one}, {part}": Entry(
                partial(
                    passes,
                    recipe_of(arch, given, given.precision if one == OURS else "fp32"),
                    device,
                    reference if one == PUBLISHED else None,
                    backward=part != "forward",
                ),
                flops,
                f"{whose[0]}, {part}",
            )
            for part, flops in parts.items()
            for one in whose
        }
    else:
        how = (False, True) if given.compile else (False,)
        steps = [Contestant(PUBLISHED, "fp32")] if published else []
        steps += [Contestant(whose, given.precision, compiled) for compiled in how for whose in (PLAIN, OURS)]
        flops, base = step_flops(config, given.batch), steps[0].name(reference)
        found = {
            one.name(reference): Entry(
                partial(one.build, one.recipe(arch, given.batch, of_all(given)), device, reference), flops, base
            )
            for one in steps
        }
    return {name: entry for name, entry in found.items() if given.only in (None, name)}


def peak_memory(
    world: World, device: torch.device, arch: str, name: str, given: argparse.Namespace, reference: Path | None
) -> int:
    """Takes three steps of a contestant on a CPU; returns the most bytes that its process has held."""
    batches = [synthetic(given.batch, recipe_of(arch, given).model.image_size, 0, device)]
    step = Measured(entries(arch, given, device, reference)[name].build, batches, device)
    for _ in range(2):
        step()
    # Not getrusage's, which a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


if __name__ == "__main__":
    sys.exit(main())
