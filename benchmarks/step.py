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
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # so that what a bare Python lacks is told by crate_dist
import crate_dist  # noqa: F401  isort: skip
import torch
import torch.nn.functional as F
from cifar10_published import reference_model
from lion_pytorch import Lion
from torch import nn

from crate_dist.config import Recipe, load_recipe
from crate_dist.distributed import init_distributed, leave_distributed
from crate_dist.models.build import build_model, model_config
from crate_dist.models.crate import CrateConfig
from crate_dist.models.matmul import linear
from crate_dist.world import VARIABLES, detect_world

Batch = tuple[torch.Tensor, torch.Tensor]
"""Images, uint8 (n, height, width, 3), and labels, int64 (n,)."""
Step = Callable[[Batch], None]
CLASSES = 1000


def main() -> int:
    """Prints one row per contestant; the published code's row has the ratio 1."""
    arguments = parse()
    device = torch.device(arguments.device)
    settings = [f"train.precision={arguments.precision}", f"train.global_batch={arguments.batch}", *arguments.overrides]
    recipe = load_recipe(arguments.arch, settings)
    world = detect_world()
    if device.type == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    init_distributed(world)
    batches = [synthetic(arguments.batch, recipe.model.image_size, seed, device) for seed in range(4)]
    entries: dict[str, Callable[[], Step]] = {}
    if arguments.reference:
        entries["published code"] = lambda: published(
            recipe, reference_model(recipe, CLASSES, arguments.reference), device
        )
    entries["crate-dist"] = lambda: ours(recipe, device, compile=False)
    if arguments.compile:
        entries["crate-dist, compiled"] = lambda: ours(recipe, device, compile=True)
    if arguments.vit and importlib.util.find_spec("timm") is None:
        print("no ViT: timm is not installed\n")
    elif arguments.vit:
        entries["ViT of timm"] = lambda: published(recipe, vit(recipe), device)
    if arguments.memory_of:
        return report_memory(entries[arguments.memory_of](), batches, device)
    if arguments.only:
        entries = {name: make for name, make in entries.items() if arguments.only == name}
    contestants = {name: make() for name, make in entries.items()}
    flops = 3 * forward_flops(model_config(recipe.model, CLASSES)) * arguments.batch
    rate = matrix_rate(
        device, torch.bfloat16 if arguments.precision == "bf16" and device.type == "cuda" else torch.float32
    )
    times = measure(contestants, batches, arguments.rounds, device)
    print(f"machine: {machine(device)}; {arguments.arch}, batch {arguments.batch}, {arguments.precision}")
    print(f"matrix product: {rate / 1e12:.3g} TFLOP/s; CRATE's counted work: {flops / 1e9:,.0f} GFLOP per step\n")
    print("| | median, s | quartiles | images/s | MFU | ratio | CPU s | ratio | peak memory, GB |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    for name, taken in times.items():
        low, median, high = statistics.quantiles([wall for wall, _ in taken], n=4)
        cpu = statistics.median(cpu for _, cpu in taken)
        if not rows:
            first, first_cpu = median, cpu
        peak = memory_of(name)
        mfu = "" if name.startswith("ViT") else f"{flops / median / rate:.1%}"
        rows.append({"name": name, "median_s": median, "quartiles_s": [low, high], "cpu_s": cpu, "peak": peak})
        print(
            f"| {name} | {median:.4f} | {low:.4f} to {high:.4f} | {arguments.batch / median:,.1f} | {mfu} "
            f"| {first / median:.2f} | {cpu:.3f} | {first_cpu / cpu:.2f} | {peak / 1e9:.2f} |",
            flush=True,
        )
    if arguments.profile:
        profile(contestants["crate-dist"], batches[0], device)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(device), "rows": rows}))
    leave_distributed()
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="crate_base", help="recipe in configs/ [%(default)s]")
    parser.add_argument("--reference", type=Path, metavar="PATH", help="checkout of the published code")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="[bf16 on a GPU, fp32 on a CPU]")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="images per step [%(default)s]")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="steps of each, after two [%(default)s]")
    parser.add_argument("--compile", action="store_true", help="ours with torch.compile as well")
    parser.add_argument("--vit", action="store_true", help="timm's ViT of the same width and depth as well")
    parser.add_argument("--only", metavar="NAME", help="one contestant alone, named as in the table")
    parser.add_argument("--memory-of", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help="name the fifteen most expensive kernels of ours")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    arguments.precision = arguments.precision or ("bf16" if arguments.device == "cuda" else "fp32")
    return arguments


def ours(recipe: Recipe, device: torch.device, compile: bool) -> Step:
    """One optimizer step of crate_dist.training.engine."""
    from crate_dist.training.engine import Engine

    train = recipe.train.model_copy(update={"compile": compile})
    recipe = recipe.model_copy(update={"train": train})
    engine = Engine(build_model(recipe.model, CLASSES, seed=0), recipe, device, recipe.train.global_batch, 1)

    def step(batch: Batch) -> None:
        engine.step(iter([batch]), recipe.optim.lr, 0)

    return step


def vit(recipe: Recipe) -> nn.Module:
    """timm's ViT of the same width, depth, heads and patches; its MLP makes it some four times as large as CRATE."""
    from timm.models.vision_transformer import VisionTransformer

    config = model_config(recipe.model, CLASSES)
    model: nn.Module = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=CLASSES,
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=config.heads,
    )
    return model


def published(recipe: Recipe, model: nn.Module, device: torch.device) -> Step:
    """One step of the published code's loop on a model."""
    model = model.to(device)
    optimizer = Lion(model.parameters(), lr=recipe.optim.lr, weight_decay=recipe.optim.weight_decay)
    mean = torch.tensor(recipe.images.mean, device=device).view(3, 1, 1)
    std = torch.tensor(recipe.images.std, device=device).view(3, 1, 1)
    on_gpu = device.type == "cuda"
    scaler = torch.amp.GradScaler("cuda", enabled=on_gpu)

    def step(batch: Batch) -> None:
        # Its loader yields normalised fp32 images: they are made here, as ours are.
        pixels, labels = batch
        images = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
        with torch.autocast("cuda", enabled=on_gpu):
            loss = F.cross_entropy(model(images), labels, label_smoothing=recipe.optim.label_smoothing)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def synthetic(count: int, side: int, seed: int, device: torch.device) -> Batch:
    """Random uint8 images and labels on the device."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return images.to(device), labels.to(device)


def measure(
    steps: dict[str, Step], batches: list[Batch], rounds: int, device: torch.device
) -> dict[str, list[tuple[float, float]]]:
    """Wall-clock and CPU seconds of each step, the contestants taking turns; the first two rounds do not count."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            synchronize(device)
            began, cpu = time.perf_counter(), time.process_time()
            step(batches[number % len(batches)])
            synchronize(device)
            if number >= 2:
                times[name].append((time.perf_counter() - began, time.process_time() - cpu))
    return times


def memory_of(name: str) -> int:
    """Peak bytes of a contestant after a few steps, in a process of its own."""
    with tempfile.NamedTemporaryFile("r") as said:
        command = [sys.executable, *sys.argv, "--memory-of", name]
        # This process's place is taken.
        env = {key: value for key, value in os.environ.items() if key not in VARIABLES} | {"STEP_MEMORY": said.name}
        subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
        return int(said.read())


def report_memory(step: Step, batches: list[Batch], device: torch.device) -> int:
    """Takes three steps and writes the peak memory to the file that `memory_of` reads."""
    for batch in batches[:3]:
        step(batch)
    synchronize(device)
    Path(os.environ["STEP_MEMORY"]).write_text(str(peak_memory(device)))
    leave_distributed()
    return 0


def forward_flops(config: CrateConfig) -> int:
    """Floating-point operations of one image's forward pass, counted as the module says."""
    n, d = config.num_tokens, config.dim
    layer = n * d * d + 2 * n * n * d + (n * d * d if config.heads > 1 else 0) + 2 * n * d * d
    patches = (n - 1) * 3 * config.patch_size**2 * d
    return 2 * (config.depth * layer + patches + d * config.num_classes)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of five, by the library that the model uses."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(side, side, device=device, dtype=dtype), torch.randn(side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):
        synchronize(device)
        began = time.perf_counter()
        linear(a, b)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds[1:])


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not getrusage's, which a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def profile(step: Step, batch: Batch, device: torch.device) -> None:
    """Prints the fifteen most expensive kernels of a step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    key = "self_cpu_time_total"
    if device.type == "cuda":
        activities, key = [*activities, torch.profiler.ProfilerActivity.CUDA], "self_device_time_total"
    with torch.profiler.profile(activities=activities) as profiler:
        step(batch)
    print("\n" + profiler.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=60))


def machine(device: torch.device) -> str:
    """Describes what was measured on."""
    chip: Any = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} x {platform.machine()}"
    return f"{chip}, {torch.get_num_threads()} threads, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(main())
