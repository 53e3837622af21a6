"""Parameter groups, AdamW and Lion, and the learning rate as a pure function of the step.

AdamW is what optax chains as clip_by_global_norm, scale_by_adam, add_decayed_weights and the learning rate, as CRATE-α
trains: decay is decoupled, and multiplied by the rate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from crate_dist.config import OptimSection
from crate_dist.training.lion import Lion

STATE_KEYS = {"lion": ("exp_avg",), "adamw": ("exp_avg", "exp_avg_sq")}
"""The tensors, as large as the weights, that each optimizer keeps."""

DECAYED: dict[str, Callable[[str, nn.Parameter, nn.Module], bool]] = {
    "all": lambda name, p, owner: True,
    "matrices": lambda name, p, owner: p.ndim == 2,
    "weights": lambda name, p, owner: p.ndim > 1 and name.rpartition(".")[2] not in ("cls_token", "pos_embedding"),
    "kernels": lambda name, p, owner: p.ndim > 1 and isinstance(owner, (nn.Linear, nn.Conv1d, nn.Conv2d)),
}
"""optim.decay: whether a parameter, of a name and directly in a module, has weight decay."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_LAYER = re.compile(r"layers\.(\d+)\.")

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
    """Returns the rate of the step that follows `step` completed ones; with optim.layer_decay, the head's.

    All rise linearly to lr over warmup_epochs, fall along half a cosine to min_lr, and stay there for cooldown_epochs:

    cosine: by steps; the first is already above warmup_lr, and the cosine begins behind the warm-up
    big_vision: by steps, the same but for the first one, at warmup_lr, and whole numbers of steps; CRATE-α's code
    reference: by epochs; the minimum of the rise and of a cosine that begins at once; CRATE's code, and CBT's
    timm: by epochs; the first is at warmup_lr, and the warm-up takes the place of the cosine's first epochs
    deit: the same an epoch late, so that two are at warmup_lr; what DeiT's loop, and ToST's, makes of timm's (they end
        before the cooldown, which is not late here)
    """
    warmup, epochs = optim.warmup_epochs, schedule.epochs - optim.cooldown_epochs
    epoch = schedule.epochs_completed(step)

    def up(share: float) -> float:
        return optim.warmup_lr + (optim.lr - optim.warmup_lr) * min(share, 1.0)

    def down(angle: float) -> float:
        return optim.min_lr + (optim.lr - optim.min_lr) * (1 + math.cos(min(angle, math.pi))) / 2

    match optim.schedule:
        case "cosine":
            begin, end = warmup * schedule.steps_per_epoch, schedule.epoch_end(epochs)
            return up((step + 1) / begin) if step < begin else down(math.pi * ((step - begin) / max(end - begin, 1)))
        case "big_vision":
            begin, end = (round(number * schedule.steps_per_epoch) for number in (warmup, epochs))
            return up(step / begin) if step < begin else down(math.pi * ((step - begin) / max(end - begin, 1)))
        case "reference":
            return min(up((epoch + 1) / warmup if warmup else 1.0), down(math.pi * epoch / epochs))
        case "deit" if epoch < epochs:
            epoch = max(epoch - 1, 0)
    return up(epoch / warmup) if epoch < warmup else down(math.pi * epoch / epochs)


def parameter_groups(model: nn.Module, optim: OptimSection) -> list[dict[str, Any]]:
    """Returns groups of parameters that share weight_decay and lr_factor, each with the `names` of its own, in order.

    optim.decay says which have weight decay. optim.layer_decay multiplies the rate of each layer that is one further
    from the head (BEiT: Bao et al. 2022, arXiv 2106.08254): 1 for the head, least for all that is before the layers.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    numbers = {name: int(found[1]) for name, _ in named if (found := _LAYER.match(name))}
    depth = max(numbers.values(), default=-1) + 1
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in named:
        below_head = 0 if name.startswith("head.") else depth - numbers.get(name, -1)
        factor = optim.layer_decay**below_head
        decays = DECAYED[optim.decay](name, parameter, model.get_submodule(name.rpartition(".")[0]))
        fresh = {"params": [], "names": [], "weight_decay": optim.weight_decay if decays else 0.0, "lr_factor": factor}
        group = groups.setdefault((factor, not decays), fresh)
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def listing(groups: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns lines on the weight decay and the factor of the learning rate of all parameters, layers in one line."""
    groups, kinds = list(groups), dict[tuple[str, float], list[tuple[str, float]]]()
    if len(groups) == 1:
        return [f"all parameters: weight decay {groups[0]['weight_decay']:g}"]
    for group in groups:
        for name in group["names"]:
            found = _NUMBER.search(name)
            pattern, number = (_NUMBER.sub("{}", name, 1), found[0]) if found else (name, "")
            kinds.setdefault((pattern, group["weight_decay"]), []).append((number, group["lr_factor"]))
    lines = []
    for (pattern, decay), members in kinds.items():
        (first, least), (last, most) = members[0], members[-1]
        name = pattern.format(first if first == last else f"{first}-{last}")
        rate = f"{least:.3g}" if least == most else f"{least:.3g} to {most:.3g}"
        lines.append((name, f"weight decay {decay:g}", f"learning rate x {rate}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def build_optimizer(groups: Iterable[dict[str, object]], optim: OptimSection) -> Optimizer:
    """Makes Lion (Chen et al. 2023, arXiv 2302.06675) or AdamW (Loshchilov, Hutter 2019, arXiv 1711.05101).

    Both take one pass over memory, and divide gradients by their attribute `grad_scale`, a 0-d tensor, where it is set.
    """
    if optim.name == "lion":
        return Lion(list(groups), optim.lr, optim.betas or (0.9, 0.99))
    return AdamW(list(groups), lr=optim.lr, betas=optim.betas or (0.9, 0.999), eps=optim.eps, fused=True)
