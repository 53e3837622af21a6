"""Parameter groups, AdamW and Lion, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from crate_dist.config import OptimSection
from crate_dist.training.lion import Lion

STATE_KEYS = {"lion": ("exp_avg",), "adamw": ("exp_avg", "exp_avg_sq")}
"""The tensors, as large as the weights, that each optimizer keeps."""

# torch asks its compiler to stay out of this method, and imports it for that: a second of every start. Nothing that is
# compiled here calls it.
_add: Any = getattr(Optimizer.add_param_group, "__wrapped__", Optimizer.add_param_group)
_add.__dynamo_disable = _add


@dataclass(frozen=True)
class Schedule:
    """The length of a run: num_samples / global_batch steps are one epoch, which need not be a whole number."""

    epochs: int
    num_samples: int
    global_batch: int

    @property
    def steps_per_epoch(self) -> float:
        """Steps, not rounded."""
        return self.num_samples / self.global_batch

    @property
    def total_steps(self) -> int:
        """Steps until every epoch has visited every sample."""
        return self.epoch_end(self.epochs)

    def epoch_end(self, epochs: int) -> int:
        """Returns the number of steps after which `epochs` epochs are complete."""
        return -(-epochs * self.num_samples // self.global_batch)

    def epochs_completed(self, step: int) -> int:
        """Returns the whole epochs that lie behind after `step` steps."""
        return step * self.global_batch // self.num_samples


def learning_rate(step: int, optim: OptimSection, schedule: Schedule) -> float:
    """Returns the rate of the step that follows `step` completed ones.

    cosine: rises linearly over optim.warmup_epochs, then falls along half a cosine to 0 at the last step.
    reference: the reference code's min((epoch + 1) / warm-up, half a cosine over all epochs), constant within an epoch.
    """
    if optim.schedule == "reference":
        epoch = schedule.epochs_completed(step)
        rise = (epoch + 1) / optim.warmup_epochs if optim.warmup_epochs else 1.0
        return optim.lr * min(rise, (1 + math.cos(math.pi * epoch / schedule.epochs)) / 2)
    warmup = optim.warmup_epochs * schedule.steps_per_epoch
    if step < warmup:
        return optim.lr * min((step + 1) / warmup, 1.0)
    progress = (step - warmup) / max(schedule.total_steps - warmup, 1)
    return optim.lr * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def parameter_groups(model: nn.Module, optim: OptimSection) -> list[dict[str, object]]:
    """Returns one group with weight decay; with decay_all off, a second one without for norms, biases and tokens.

    Each group carries the `names` of its parameters, in order.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if optim.decay_all:
        return [_group(named, optim.weight_decay)]
    matrices = [(name, p) for name, p in named if p.ndim == 2]
    others = [(name, p) for name, p in named if p.ndim != 2]
    return [_group(matrices, optim.weight_decay), _group(others, 0.0)]


def build_optimizer(groups: Iterable[dict[str, object]], optim: OptimSection) -> Optimizer:
    """Makes Lion (Chen et al. 2023, arXiv 2302.06675) or AdamW (Loshchilov, Hutter 2019, arXiv 1711.05101).

    Both take one pass over memory, and divide gradients by their attribute `grad_scale`, a 0-d tensor, where it is set.
    """
    if optim.name == "lion":
        return Lion(list(groups), optim.lr, optim.betas or (0.9, 0.99))
    return AdamW(list(groups), lr=optim.lr, betas=optim.betas or (0.9, 0.999), eps=optim.eps, fused=True)


def _group(named: list[tuple[str, nn.Parameter]], weight_decay: float) -> dict[str, object]:
    return {
        "params": [parameter for _, parameter in named],
        "names": [name for name, _ in named],
        "weight_decay": weight_decay,
    }
