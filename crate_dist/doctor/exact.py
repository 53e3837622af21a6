"""What fp64 on the CPU says of a small CRATE, and how far from that a computation may be.

A bound is relative: two or three times the error that the plainest form of the same mathematics (`published.PlainForm`)
has against fp64 in the same precision on the same device, for each tensor, or for the median tensor where a tensor
comes out better than that. The plain form itself must stay below `PLAIN`, so that a device at fault is no measure. An
error is ‖a - b‖ / ‖b‖, and one that is not a number is above every bound.

A gradient jumps where rounding opens or closes a ReLU, which in fp32 happens about once in a run or never: it may be
`FLIPS` codes of a layer away in any case. So that no few of them decide, the head reads the mean of all tokens.

Weights and images are fresh random numbers: those that a model begins with are zeros, ones and copies, by which a
mix-up goes unseen. They are rounded to bf16 first, which is then exact in every precision.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_dist.config import Recipe
from crate_dist.data.loader import Normalize
from crate_dist.doctor.contestants import SMALL, recipe_for, synthetic
from crate_dist.doctor.published import CPU, PlainForm
from crate_dist.doctor.stage import Finding
from crate_dist.models.build import initialise, model_config
from crate_dist.models.transformer import Transformer
from crate_dist.training.engine import Engine, MicroBatch

FACTOR, ROUNDED_FACTOR = 3.0, 2.0
"""The second where the products are in bf16, whose error is the same in every right way to compute: up to 1.4 times the
plain form's, over seeds. In fp32 the order of sums counts. The class token is one of many: with few codes that act on
it, some bf16 opens and others closes, its gradient's error scatters up to twice the plain form's, and the first holds.
"""
PLAIN = {"bf16": 0.5, "autocast": 0.5, "fp32": 1e-3}
"""The largest error of the plain form that can be rounding."""
FLIPS = 9.0
"""Of n codes that are not zero, one that opens moves a gradient by about 1 / √n of its norm, and nine by 3 / √n."""
LOGITS = 5e-6
"""The error that logits may have in any case: attention kernels of GPUs compute an fp32 product by three in TF32."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, a batch, and what fp64 says of them."""

    model: Transformer
    recipe: Recipe
    batch: MicroBatch
    exact: dict[str, Tensor]

    def jump(self, tensor: str) -> float:
        """Returns the relative error that `FLIPS` ReLUs make; half of the codes that a tensor acts on count as open."""
        if tensor == "logits":
            return LOGITS
        config = self.model.config
        tokens = len(self.batch[0]) * (1 if tensor == "cls_token" else config.num_tokens)
        return math.sqrt(FLIPS / (0.5 * tokens * config.dim))

    def engine(self, device: torch.device, update: Mapping[str, object] | None = None, **train: object) -> Engine:
        """Returns a fresh engine around a copy of the model. update: of the recipe; train: of its [train]."""
        changed = {"train": self.recipe.train.model_copy(update=train), **(update or {})}
        recipe = self.recipe.model_copy(update=changed)
        return Engine(copy_of(self.model), recipe, device, recipe.train.global_batch, 1)


def new_case(small: bool, seed: int) -> Case:
    """Returns a CRATE-B of two layers and eight images; in small the demo's width and more images, which are small."""
    model, recipe = new_model(small, seed)
    config = model.config
    images, labels = synthetic(recipe.train.global_batch, config.image_size, seed, CPU)
    batch = images, labels % config.num_classes
    return Case(model, recipe, batch, computed(PlainForm(copy_of(model).double()), recipe, batch, torch.float64))


def new_model(small: bool, seed: int) -> tuple[Transformer, Recipe]:
    """Returns the model of a case, and the recipe of its steps."""
    overrides = ["model.pool=mean", *(SMALL if small else ())]
    recipe = recipe_for("crate_base", 32 if small else 8, "fp32", overrides=overrides)
    config = dataclasses.replace(model_config(recipe.model, 100), depth=2)
    model = initialise(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator) * (0.2 if weight.ndim == 1 else 0.1 * weight.std())
            weight.copy_((weight + noise).bfloat16().float())
    return model, recipe


def copy_of(model: Transformer) -> Transformer:
    """Returns a model of its own with the same weights."""
    copied = Transformer(model.config)
    copied.load_state_dict(model.state_dict())
    return copied


def computed(form: PlainForm, recipe: Recipe, batch: MicroBatch, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the logits and the loss's gradients that the plain form gives, in fp64 on the CPU."""
    device = form.model.cls_token.device
    normalize = Normalize(recipe.images.mean, recipe.images.std, device, dtype)
    if dtype == torch.float64:  # of what the others are given: no error is in the images
        images = Normalize(recipe.images.mean, recipe.images.std, device, torch.float32)(batch[0]).double()
    else:
        images = normalize(batch[0])
    logits = form(images)
    loss = F.cross_entropy(
        logits.double() if dtype == torch.float64 else logits.float(),
        batch[1].to(device),
        label_smoothing=recipe.optim.label_smoothing,
    )
    return _named(form.model, logits, loss)


def of_engine(engine: Engine, batch: MicroBatch) -> dict[str, Tensor]:
    """Returns the logits and the loss's gradients of an engine's training pass, in fp64 on the CPU."""
    seen: list[Tensor] = []
    hook = engine.module.register_forward_hook(lambda _, __, output: seen.append(output))
    engine.module.train()
    loss = engine.loss(batch)
    hook.remove()
    return _named(engine.module, seen[0], loss)


def _named(model: nn.Module, logits: Tensor, loss: Tensor) -> dict[str, Tensor]:
    names, weights = zip(*model.named_parameters(), strict=True)
    tensors = {"logits": logits, **dict(zip(names, torch.autograd.grad(loss, weights), strict=True))}
    return {name: tensor.detach().double().cpu() for name, tensor in tensors.items()}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Returns ‖found - exact‖ / ‖exact‖ of each tensor."""
    return {name: float((found[name] - value).norm() / value.norm()) for name, value in exact.items()}


def plainly(case: Case, precision: str, device: torch.device) -> dict[str, Tensor]:
    """Returns what the plain form gives in a precision on the device."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "autocast" else nullcontext()
    with autocast:
        return computed(PlainForm(copy_of(case.model).to(device, dtype)), case.recipe, case.batch, dtype)


def compared(
    name: str,
    found: dict[str, float],
    plain: dict[str, float],
    jump: Callable[[str], float] = lambda _: 0.0,
    factor: float = FACTOR,
) -> Finding:
    """Returns the finding on the tensor that comes nearest to its bound, or is the farthest beyond.

    jump: what a tensor may be off in any case; factor: how many times the plain form's error
    """
    usual = statistics.median(plain.values())
    factors = {tensor: FACTOR if tensor == "cls_token" else factor for tensor in plain}
    bounds = {tensor: max(factors[tensor] * max(error, usual), jump(tensor)) for tensor, error in plain.items()}
    near = {tensor: error / bounds[tensor] for tensor, error in found.items()}
    worst = max(near, key=lambda tensor: near[tensor] if near[tensor] == near[tensor] else float("inf"))
    return Finding(
        name,
        found[worst],
        "",
        f"at most {bounds[worst]:.2g}",
        near[worst] <= 1,
        f"of {worst}, the nearest to its bound",
        {"errors": found, "bounds": bounds},
    )
