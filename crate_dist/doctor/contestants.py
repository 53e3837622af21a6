"""Training steps that are measured against each other, on the same random batches: ours, a plain loop, the published.

Each is a function of a batch that takes one optimizer step and waits for nothing that it need not wait for.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from crate_dist.config import Recipe, load_recipe
from crate_dist.data.loader import Normalize
from crate_dist.distributed import init_distributed, leave_distributed
from crate_dist.doctor import checkouts, published
from crate_dist.doctor.stage import Setting
from crate_dist.doctor.timing import synchronize
from crate_dist.errors import UserError
from crate_dist.models.build import build_model
from crate_dist.models.kernels import choose_kernels
from crate_dist.models.transformer import Transformer
from crate_dist.training import compiling
from crate_dist.training.engine import Engine, MicroBatch
from crate_dist.training.lion import Lion
from crate_dist.training.optim import build_optimizer, parameter_groups
from crate_dist.world import World, free_port

CLASSES = 1000
OURS, PLAIN, PUBLISHED = "ours", "plain loop", "published"
SMALL = ("model.arch=crate_demo", "model.image_size=32", "model.patch_size=8")
"""Overrides that make of any recipe a model which a CPU computes at once."""
Step = Callable[[MicroBatch], object]


class NotCompiled(UserError):
    """torch.compile does not work here; the log says why."""


@contextlib.contextmanager
def alone(setting: Setting | None = None) -> Iterator[torch.device]:
    """Joins a process group of this process alone; gives its device, the first GPU where one can be seen."""
    prepare(setting)
    device = init_distributed(World(0, 1, 0, 1, "127.0.0.1", free_port(), "alone"))
    try:
        yield device
    finally:
        leave_distributed()


def prepare(setting: Setting | None = None) -> None:
    """Chooses kernels as training does; the stages of one examination find what another one of it has compiled."""
    choose_kernels()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(8, len(os.sched_getaffinity(0)))))
    if setting is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_compiled(setting)))


def is_warm(setting: Setting, what: str) -> bool:
    """Tells whether this examination has compiled that: a recipe's steps, `called`, or a case of the stage correct."""
    return (_compiled(setting) / f"done: {what}").exists()


def note_warm(setting: Setting, what: str) -> None:
    """Notes for the stages behind that it has."""
    (_compiled(setting) / f"done: {what}").mkdir(parents=True, exist_ok=True)


def of_case(precision: str) -> str:
    """Returns a name for what is compiled for the case of the stage correct."""
    return f"the case of correct, {precision}"


def called(recipe: Recipe) -> str:
    """Returns a name for what is compiled for a recipe's steps: "crate_base at 256, bf16"."""
    return f"{recipe.model.arch} at {recipe.train.micro_batch}, {recipe.train.precision}"


def _compiled(setting: Setting) -> Path:
    return setting.scratch.parent / "compiled"


def made(recipe: Recipe, device: torch.device, accumulation: int = 1, ranks: int = 1) -> tuple[Engine, float]:
    """Returns an engine for so many of the recipe's micro-batches on each rank, and the seconds until it was ready."""
    began, micro_batch = time.monotonic(), recipe.train.micro_batch
    train = recipe.train.model_copy(update={"global_batch": micro_batch * accumulation * ranks})
    recipe = recipe.model_copy(update={"train": train})
    engine = Engine(build_model(recipe.model, CLASSES, seed=0), recipe, device, micro_batch, accumulation)
    return engine, time.monotonic() - began


def recipe_for(
    arch: str, batch: int, precision: str = "bf16", compile: bool = False, overrides: Sequence[str] = ()
) -> Recipe:
    """Returns the recipe of that name, for steps of one micro-batch on one rank."""
    train = [
        f"precision={precision}",
        f"global_batch={batch}",
        f"micro_batch={batch}",
        f"compile={str(compile).lower()}",
    ]
    return load_recipe(arch, [*(f"train.{setting}" for setting in train), *overrides])


def synthetic(count: int, side: int, seed: int, device: torch.device) -> MicroBatch:
    """Returns random uint8 images (count, side, side, 3) and labels on the device."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return images.to(device), labels.to(device)


def ours(recipe: Recipe, device: torch.device) -> Step:
    """Returns the step of training.engine, with ZeRO-2 and all. Raises NotCompiled."""
    engine = Engine(build_model(recipe.model, CLASSES, seed=0), recipe, device, recipe.train.global_batch, 1)
    if recipe.train.compile is True and not is_compiled(engine.module):
        raise NotCompiled("torch.compile does not work here; the log says why")
    return lambda batch: engine.step(iter([batch]), recipe.optim.lr, 0)


def plain_loop(recipe: Recipe, device: torch.device) -> Step:
    """Returns the same step without DeepSpeed: its model, loss, clipping, optimizer and fp32 master weights.

    What the engine takes longer is what ZeRO costs on one rank. Raises NotCompiled.
    """
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    model = build_model(recipe.model, CLASSES, seed=0).to(device, dtype)
    batch, autocast = recipe.train.global_batch, recipe.train.precision == "autocast"
    model.set_execution(recompute=recipe.train.recompute, autocast=autocast, images=batch)
    [group] = parameter_groups(model, recipe.optim.model_copy(update={"decay": "all", "layer_decay": 1.0}))
    weights = list(model.parameters())
    master = nn.Parameter(torch.cat([p.detach().float().flatten() for p in weights]))
    copies = [
        part.view_as(p) for part, p in zip(master.detach().split([p.numel() for p in weights]), weights, strict=True)
    ]
    optimizer = build_optimizer([{**group, "params": [master]}], recipe.optim)
    normalize = Normalize(recipe.images.mean, recipe.images.std, device, dtype)

    def loss_of(batch: MicroBatch) -> torch.Tensor:
        logits = model(normalize(batch[0])).float()
        return F.cross_entropy(logits, batch[1], label_smoothing=recipe.optim.label_smoothing)

    def step(batch: MicroBatch) -> torch.Tensor:
        loss = loss_of(batch)
        gradients = torch.autograd.grad(loss, weights)
        master.grad = torch.cat([gradient.flatten() for gradient in gradients]).float()
        if recipe.optim.grad_clip:
            scale = (master.grad.norm() / recipe.optim.grad_clip).clamp(min=1.0)
            optimizer.grad_scale = scale  # type: ignore[attr-defined]
        optimizer.step()
        torch._foreach_copy_([p.data for p in weights], copies)
        return loss.detach()

    if compiling.should_compile(recipe.train.compile, device):
        tried = synthetic(batch, recipe.model.image_size, 0, device)
        passes = lambda: torch.autograd.grad(loss_of(tried), list(model.parameters()))  # noqa: E731
        if not compiling.compile_model(model, passes, device):
            raise NotCompiled("torch.compile does not work here; the log says why")
        if isinstance(optimizer, Lion) and device.type == "cuda":
            compiling.compile_lion(optimizer, recipe.optim.grad_clip > 0, device)
    return step


def published_loop(recipe: Recipe, device: torch.device, reference: Path | None) -> Step:
    """Returns the published loop around the published model; without a checkout of it, around `published.PlainForm`.

    Raises RecipeError as checkouts.load_model does.
    """
    ours = build_model(recipe.model, CLASSES, seed=0)
    model = published.PlainForm(ours) if reference is None else checkouts.twin(ours, reference)
    loop = published.Loop(model, recipe, device)
    normalize = Normalize(recipe.images.mean, recipe.images.std, device, torch.float32)
    # Its loader yields contiguous, normalised fp32 images: they are made here, as ours are.
    return lambda batch: loop.step(normalize(batch[0]).contiguous(), batch[1])


def passes(recipe: Recipe, device: torch.device, reference: Path | None, *, backward: bool) -> Step:
    """Returns the passes of a model alone: of ours, or of the published one from a checkout, with the same weights.

    backward: forward and backward as in training; else the forward pass of an evaluation. The published model is in
    fp32, on a GPU under autocast. Raises RecipeError as checkouts.load_model does.
    """
    ours = build_model(recipe.model, CLASSES, seed=0)
    ours.set_execution(autocast=recipe.train.precision == "autocast", images=recipe.train.global_batch)
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    model = (checkouts.twin(ours, reference) if reference else ours).to(device, dtype).train(backward)
    normalize, weights = Normalize(recipe.images.mean, recipe.images.std, device, dtype), list(model.parameters())
    rounded = reference is not None and device.type == "cuda"

    def step(batch: MicroBatch) -> object:
        with torch.set_grad_enabled(backward), torch.autocast(device.type, torch.bfloat16, enabled=rounded):
            logits = model(normalize(batch[0]).contiguous()).float()
            if not backward:
                return logits
            loss = F.cross_entropy(logits, batch[1], label_smoothing=recipe.optim.label_smoothing)
        return torch.autograd.grad(loss, weights)

    return step


def is_compiled(model: Transformer) -> bool:
    """Tells whether the layers run compiled."""
    return all(layer._compiled_call_impl is not None for layer in model.layers)


@dataclass(frozen=True)
class Contestant:
    """Whose step it is, its precision, and whether it is compiled; the published loop's precision is its own."""

    whose: str
    precision: str = "bf16"
    compiled: bool = False

    def recipe(self, arch: str, batch: int, overrides: tuple[str, ...] = ()) -> Recipe:
        """Returns the recipe of its steps."""
        return recipe_for(arch, batch, self.precision, self.compiled, overrides)

    def build(self, recipe: Recipe, device: torch.device, reference: Path | None) -> Step:
        """Returns its step."""
        if self.whose == PUBLISHED:
            return published_loop(recipe, device, reference)
        return (ours if self.whose == OURS else plain_loop)(recipe, device)

    def name(self, reference: Path | None) -> str:
        """Returns its name in the report."""
        if self.whose == PUBLISHED:
            return "published code" if reference else "published formulation, plain PyTorch"
        how = "compiled" if self.compiled else "eager"
        return f"{self.whose}{' without DeepSpeed' if self.whose == PLAIN else ''}, {self.precision}, {how}"


class Measured:
    """A contestant's step, warm, with the most bytes that the device held for it alone; None: not measured."""

    def __init__(self, build: Callable[[], Step], batches: list[MicroBatch], device: torch.device) -> None:
        others = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        self._step, self._batches = build(), itertools.cycle(batches)
        self()
        synchronize(device)
        self.peak: int | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self()
            synchronize(device)
            self.peak = torch.cuda.max_memory_allocated() - others

    def __call__(self) -> None:
        """Takes a step."""
        self._step(next(self._batches))


def free(device: torch.device) -> None:
    """Gives back what nobody holds any more; engines are circles of references."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
