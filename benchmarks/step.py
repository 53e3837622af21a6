"""The training step: ours, a plain loop around our model, and the published code, on the same batches, in turns.

    python benchmarks/step.py --reference PATH [--precision bf16] [--compile] [--vit] [--batch 8] [--rounds 10]

--reference is a checkout of the published code, whose model is imported from there; without it, its formulation in
plain PyTorch stands in. Its loop, as its main.py has it: fp16 under autocast with GradScaler on a GPU, plain fp32 on a
CPU; zero_grad, forward, loss, backward, Lion from lion-pytorch. Ours is training.engine on one rank, with ZeRO-2 and
all; the plain loop is the same step without DeepSpeed. --compile adds both compiled. --vit adds, for scale, timm's ViT
of the same width, depth and heads in the published loop, where timm is installed.

Steps are queued without waiting, --queued at a time between two events, and the device's seconds divided by their
number. CPU seconds are those of all threads: what a step costs on a machine where other work takes part of the wall
clock. Peak memory is the device's for the contestant alone; on a CPU that of a process of its own.

FLOPs are those of models/costs.py: matrix products alone, 2 per multiply-add, in the fewest that the mathematics
needs: one that is saved is not counted as work done. The backward pass counts twice the forward. MFU is that over the
rate of a large matrix product on the same device in the same run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import measuring  # isort: skip
import torch
from torch import nn

from crate_dist.doctor.ceilings import product_flop_s
from crate_dist.doctor.contestants import (
    CLASSES,
    OURS,
    PLAIN,
    PUBLISHED,
    Contestant,
    Measured,
    alone,
    in_published_loop,
    synthetic,
)
from crate_dist.doctor.profiling import profiled
from crate_dist.doctor.timing import in_turns
from crate_dist.models.build import model_config
from crate_dist.models.config import ModelConfig
from crate_dist.models.costs import step_flops
from crate_dist.world import World

VIT = "ViT of timm"


def main() -> int:
    """Prints one row per contestant; the published code's, which is the first, has the ratio 1."""
    given = parse()
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with alone() as device:
        return compare(given, device)


def compare(given: argparse.Namespace, device: torch.device) -> int:
    """Measures and prints."""
    running = {name: measured(name, given, device) for name in contestants(given)}
    recipe = Contestant(OURS).recipe(given.arch, given.batch, tuple(given.overrides))
    flops = step_flops(model_config(recipe.model, CLASSES), given.batch)
    side = 8192 if device.type == "cuda" else 2048
    dtype = torch.float32 if given.precision == "fp32" else torch.bfloat16
    rate = product_flop_s(device, side, side, side, dtype)
    taken = in_turns(running, device, given.rounds, given.queued)
    machine = measuring.machine("torch") | {"threads": torch.get_num_threads()}
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    print(f"{measuring.in_words(machine)}; {given.arch}, batch {given.batch}, {given.precision}")
    print(f"matrix product: {rate / 1e12:.3g} TFLOP/s; CRATE's counted work: {flops / 1e9:,.0f} GFLOP per step\n")
    rows: list[dict[str, Any]] = []

    def shown() -> Iterator[list[object]]:
        for name, each in taken.items():
            low, median, high = measuring.quartiles([one.device_s for one in each])
            host, cpu = (statistics.median(getattr(one, part) for one in each) for part in ("host_s", "cpu_s"))
            peak = running[name].peak or measuring.on_ranks(1, peak_memory, name, given)[0]
            row = {
                "name": name,
                "median_s": median,
                "quartiles_s": [low, high],
                "host_s": host,
                "cpu_s": cpu,
                "peak": peak,
            }
            rows.append(row)
            mfu = "" if name == VIT else flops / median / rate
            speed = [given.batch / median, mfu, rows[0]["median_s"] / median]
            yield [name, median, f"{low:.4f} to {high:.4f}", *speed, host, cpu, rows[0]["cpu_s"] / cpu, peak / 1e9]

    head = ["", "median, s", "quartiles", "images/s", "MFU", "ratio", "host, s", "CPU s", "ratio", "peak memory, GB"]
    measuring.print_table(head, shown(), "s .4f s ,.1f .1% .2f .4f .3f .2f .2f")
    if given.profile:
        name = [name for name in running if name.startswith(OURS)][-1]
        print(f"{name}: " + profiled(running[name], device).costliest(15))
    measuring.write_json(given.json, {"machine": machine, "rows": rows})
    return 0


def parse() -> argparse.Namespace:
    """Reads the command line."""
    on_gpu = torch.cuda.is_available()
    parser = measuring.parser(__doc__, measuring.arch("crate_base"), measuring.JSON)
    parser.add_argument("--reference", type=Path, metavar="PATH", help="checkout of the published code")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if on_gpu else "cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16", "autocast"], help="of ours [bf16 on a GPU, else fp32]")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="images per step [%(default)s]")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="turns of each, after two [%(default)s]")
    parser.add_argument("--queued", type=int, metavar="N", help="steps of a turn [8 on a GPU, else 1]")
    parser.add_argument("--compile", action="store_true", help="ours and the plain loop with torch.compile as well")
    parser.add_argument("--vit", action="store_true", help="timm's ViT of the same width and depth as well")
    parser.add_argument("--only", metavar="NAME", help="one contestant alone, named as in the table")
    parser.add_argument("--profile", action="store_true", help="name the fifteen most expensive kernels of ours")
    given = parser.parse_args()
    given.precision = given.precision or ("bf16" if given.device == "cuda" else "fp32")
    given.queued = given.queued or (8 if given.device == "cuda" else 1)
    return given


def contestants(given: argparse.Namespace) -> dict[str, Contestant | None]:
    """Returns those that the command line names, by their names in the table."""
    how = (False, True) if given.compile else (False,)
    ours = [Contestant(whose, given.precision, compiled) for compiled in how for whose in (PLAIN, OURS)]
    named: dict[str, Contestant | None] = {
        one.name(given.reference): one for one in (Contestant(PUBLISHED, "fp32"), *ours)
    }
    if given.vit and importlib.util.find_spec("timm") is None:
        print("no ViT: timm is not installed\n")
    elif given.vit:
        named[VIT] = None
    return {name: one for name, one in named.items() if given.only in (None, name)}


def measured(name: str, given: argparse.Namespace, device: torch.device) -> Measured:
    """Returns a contestant's step, warm, on four batches in turn."""
    one = contestants(given)[name]
    recipe = (one or Contestant(PUBLISHED, "fp32")).recipe(given.arch, given.batch, tuple(given.overrides))
    batches = [synthetic(given.batch, recipe.model.image_size, seed, device) for seed in range(4)]
    if one:
        return Measured(partial(one.build, recipe, device, given.reference), batches, device)
    return Measured(
        lambda: in_published_loop(vit(model_config(recipe.model, CLASSES)), recipe, device), batches, device
    )


def vit(config: ModelConfig) -> nn.Module:
    """Returns timm's ViT of the same width, depth, heads and patches; its MLP makes it some four times as large."""
    from timm.models.vision_transformer import VisionTransformer

    model: nn.Module = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=CLASSES,
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=config.heads,
    )
    return model


def peak_memory(world: World, device: torch.device, name: str, given: argparse.Namespace) -> int:
    """Takes three steps of a contestant on a CPU; returns the most bytes that its process has held."""
    step = measured(name, given, device)
    for _ in range(2):
        step()
    # Not getrusage's, which a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


if __name__ == "__main__":
    sys.exit(main())
