"""The training step: ours and the published code's model and loop, on the same batches, in turns, in one run.

    python benchmarks/step.py --reference PATH [--compile] [--vit] [--device cpu|cuda] [--batch 8] [--rounds 10]

--reference is a checkout of the published code, whose model is imported from there. Its loop, as its main.py has it:
under autocast and GradScaler on a GPU, plain fp32 on a CPU; zero_grad, forward, loss, backward, Lion from lion-pytorch.
Ours is training.engine on one rank, with ZeRO-2 and all; --compile adds it with train.compile on. --vit adds, for
scale, timm's ViT of the same width, depth and heads in the published loop, where timm is installed.

CPU seconds are those of all threads: what a step costs on a machine where other work takes part of the wall clock.
Peak memory is measured in a process of its own for each, with as little else in it as can be.

FLOPs are counted from shapes, 2 per multiply-add, matrix products alone, in the fewest products that the mathematics
needs (two for ISTA): a product that is saved is not counted as work done. The backward pass counts twice the forward.
MFU is that over the rate of a large matrix product on the same device in the same run.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measuring  # isort: skip
import published
import torch
from measuring import Cost
from torch import nn

from crate_dist.config import Recipe, load_recipe
from crate_dist.distributed import init_distributed, leave_distributed
from crate_dist.models.build import build_model, model_config
from crate_dist.models.crate import CrateConfig
from crate_dist.models.matmul import linear
from crate_dist.world import World, detect_world

Batch = tuple[torch.Tensor, torch.Tensor]
"""Images, uint8 (n, height, width, 3), and labels, int64 (n,)."""
Step = Callable[[Batch], None]
CLASSES = 1000
PUBLISHED, OURS, COMPILED, VIT = "published code", "crate-dist", "crate-dist, compiled", "ViT of timm"


def main() -> int:
    """Prints one row per contestant; the published code's row has the ratio 1."""
    given = parse()
    device = torch.device(given.device)
    if device.type == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    names = {PUBLISHED: given.reference, OURS: True, COMPILED: given.compile, VIT: given.vit}
    if given.vit and importlib.util.find_spec("timm") is None:
        print("no ViT: timm is not installed\n")
        del names[VIT]
    chosen = [name for name, wanted in names.items() if wanted and given.only in (None, name)]
    init_distributed(detect_world())
    contestants, batches = {name: build(name, given, device) for name in chosen}, synthetic_batches(given, device)
    flops = 3 * forward_flops(model_config(recipe_of(given).model, CLASSES)) * given.batch
    rate = matrix_rate(device, torch.bfloat16 if given.precision == "bf16" and device.type == "cuda" else torch.float32)
    turns = {name: turn(step, batches, device) for name, step in contestants.items()}
    costs = measuring.in_turns(turns, given.rounds, warm_up=2)
    machine = measuring.machine("torch") | {"threads": torch.get_num_threads()}
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    print(f"{measuring.in_words(machine)}; {given.arch}, batch {given.batch}, {given.precision}")
    print(f"matrix product: {rate / 1e12:.3g} TFLOP/s; CRATE's counted work: {flops / 1e9:,.0f} GFLOP per step\n")
    rows: list[dict[str, Any]] = []

    def shown() -> Iterator[list[object]]:
        for name, taken in costs.items():
            low, median, high = measuring.quartiles([cost.wall_s for cost in taken])
            cpu = statistics.median(cost.cpu_s for cost in taken)
            [peak] = measuring.on_ranks(1, peak_memory, name, given)
            rows.append({"name": name, "median_s": median, "quartiles_s": [low, high], "cpu_s": cpu, "peak": peak})
            speed = [given.batch / median, "" if name == VIT else flops / median / rate, rows[0]["median_s"] / median]
            used = [cpu, rows[0]["cpu_s"] / cpu, peak / 1e9]
            yield [name, median, f"{low:.4f} to {high:.4f}", *speed, *used]

    head = ["", "median, s", "quartiles", "images/s", "MFU", "ratio", "CPU s", "ratio", "peak memory, GB"]
    measuring.print_table(head, shown(), "s .4f s ,.1f .1% .2f .3f .2f .2f")
    if given.profile:
        profile(contestants[OURS], batches[0], device)
    measuring.write_json(given.json, {"machine": machine, "rows": rows})
    leave_distributed()
    return 0


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = measuring.parser(__doc__, measuring.arch("crate_base"), measuring.JSON)
    parser.add_argument("--reference", type=Path, metavar="PATH", help="checkout of the published code")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="[bf16 on a GPU, fp32 on a CPU]")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="images per step [%(default)s]")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="steps of each, after two [%(default)s]")
    parser.add_argument("--compile", action="store_true", help="ours with torch.compile as well")
    parser.add_argument("--vit", action="store_true", help="timm's ViT of the same width and depth as well")
    parser.add_argument("--only", metavar="NAME", help="one contestant alone, named as in the table")
    parser.add_argument("--profile", action="store_true", help="name the fifteen most expensive kernels of ours")
    given = parser.parse_args()
    given.precision = given.precision or ("bf16" if given.device == "cuda" else "fp32")
    return given


def recipe_of(given: argparse.Namespace, compile: bool = False) -> Recipe:
    """Returns the recipe that the command line names."""
    settings = [f"train.precision={given.precision}", f"train.global_batch={given.batch}", *given.overrides]
    return load_recipe(given.arch, [*settings, f"train.compile={str(compile).lower()}"])


def build(name: str, given: argparse.Namespace, device: torch.device) -> Step:
    """Returns the step of a contestant."""
    recipe = recipe_of(given, compile=name == COMPILED)
    if name in (OURS, COMPILED):
        return ours(recipe, device, given.batch)
    config = model_config(recipe.model, CLASSES)
    model = published.load_model(config, given.reference) if name == PUBLISHED else vit(config)
    loop, normalise = published.Loop(model, recipe, device), published.Normalise(recipe.images, device)

    def step(batch: Batch) -> None:
        # Its loader yields normalised fp32 images: they are made here, as ours are.
        loop.step(normalise.batch(batch[0]), batch[1])

    return step


def ours(recipe: Recipe, device: torch.device, micro_batch: int) -> Step:
    """Returns one optimizer step of crate_dist.training.engine."""
    from crate_dist.training.engine import Engine

    engine = Engine(build_model(recipe.model, CLASSES, seed=0), recipe, device, micro_batch, 1)

    def step(batch: Batch) -> None:
        engine.step(iter([batch]), recipe.optim.lr, 0)

    return step


def vit(config: CrateConfig) -> nn.Module:
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


def synthetic_batches(given: argparse.Namespace, device: torch.device) -> list[Batch]:
    """Returns four batches for the command line."""
    return [synthetic(given.batch, recipe_of(given).model.image_size, seed, device) for seed in range(4)]


def synthetic(count: int, side: int, seed: int, device: torch.device) -> Batch:
    """Returns random uint8 images and labels on the device."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return images.to(device), labels.to(device)


def forward_flops(config: CrateConfig) -> int:
    """Returns the floating-point operations of one image's forward pass, counted as the module says."""
    n, d = config.num_tokens, config.dim
    layer = n * d * d + 2 * n * n * d + (n * d * d if config.heads > 1 else 0) + 2 * n * d * d
    patches = (n - 1) * 3 * config.patch_size**2 * d
    return 2 * (config.depth * layer + patches + d * config.num_classes)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Returns FLOP/s of a large matrix product, the best of six, by the library that the model uses."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / min(cost_on(device, linear, a, b).wall_s for _ in range(6))


def turn(step: Step, batches: list[Batch], device: torch.device) -> Callable[[], Cost]:
    """Returns what measures a step on one batch after the other."""
    following = itertools.cycle(batches)
    return lambda: cost_on(device, step, next(following))


def cost_on(device: torch.device, work: Callable[..., object], *arguments: object) -> Cost:
    """Measures work until the device has done it."""

    def to_the_end() -> None:
        work(*arguments)
        synchronize(device)

    synchronize(device)
    return measuring.cost(to_the_end)


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(world: World, device: torch.device, name: str, given: argparse.Namespace) -> int:
    """Takes three steps of a contestant; returns peak bytes, of the device on a GPU, of the process on a CPU."""
    step = build(name, given, device)
    for batch in synthetic_batches(given, device)[:3]:
        step(batch)
    synchronize(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not getrusage's, which a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def profile(step: Step, batch: Batch, device: torch.device) -> None:
    """Prints the fifteen most expensive kernels of a step."""
    key = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    with torch.profiler.profile() as profiler:
        step(batch)
    print("\n" + profiler.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=60))


if __name__ == "__main__":
    sys.exit(main())
