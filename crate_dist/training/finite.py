"""Finds the layer and the samples in which the numbers of a step stopped being finite, after the fact.

A step carries nothing for it: its micro-batches are made again from the order of the samples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from crate_dist.data.loader import TrainLoader
from crate_dist.data.reader import ShardReader
from crate_dist.distributed import gather_objects
from crate_dist.errors import UserError
from crate_dist.training.compiling import eagerly
from crate_dist.training.engine import Engine, NotFinite
from crate_dist.training.mixing import Mixing
from crate_dist.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

_NAMED = 3
_PATIENCE = 4.0  # times safety.hang_timeout_s: a micro-batch is decoded by one process, and computed without a compiler


def post_mortem(engine: Engine, batches: TrainLoader, step: int, watchdog: Watchdog) -> NotFinite:
    """Says where the numbers of the step after `step` stopped being finite, and in which samples. A collective.

    batches: of this rank from that step on. Each rank looks for the first in which it can be seen, and logs its samples
    """
    source, mixing, place, keys = batches.source, Mixing(engine.recipe), None, list[str]()
    first = step * source.share.accumulation
    looking = partial(watchdog.beat, f"looking for what is not finite in step {step + 1}", _PATIENCE)
    looking()
    engine.seed_dropout(step)
    try:
        for number, batch in enumerate(islice(batches, source.share.accumulation), start=first):
            looking()
            given, kept = mixing.mixed(batch, step), engine.kept_branches(step, number - first)
            with eagerly():
                place = where_not_finite(engine.module, partial(engine.loss, given, kept))
            if place:
                reader = ShardReader(source.index)
                named = (reader.describe(sample, "") for sample in source.samples(number).tolist())
                keys = [f"{item.shard}:{item.key}" for item in named]
                logger.info("samples in which step %d is not finite: %s", step + 1, ", ".join(keys))
                break
    except (OSError, UserError) as error:  # the others wait for what this rank has found
        place = f"not known where, since its batch cannot be read again ({error})"
    except torch.OutOfMemoryError:  # this pass is eager, and holds all gradients at a time
        place = "not known where, for want of memory to compute it again; a smaller train.micro_batch leaves some"
    every = gather_objects((place, keys))
    found = "; ".join(f"rank {rank}: {place}" for rank, (place, _) in enumerate(every) if place)
    keys = [key for _, keys in every for key in keys]
    listed = ", ".join(keys[:_NAMED]) + (
        f" and {len(keys) - _NAMED} more, in the logs of the ranks" if len(keys) > _NAMED else ""
    )
    clip = "a smaller optim.grad_clip" if engine.recipe.optim.grad_clip else "optim.grad_clip=1, which is 0,"
    return NotFinite(
        f"step {step + 1}, not finite: "
        f"{found or 'the gradients or their norm, though the gradients of each rank are when computed again'}. "
        f"The step was not taken and nothing was saved of it. "
        f"A lower optim.lr, a longer optim.warmup_epochs or {clip} may help."
        + (f" Samples: {listed}" if listed else "")
    )


def where_not_finite(model: nn.Module, loss_of: Callable[[], Tensor]) -> str | None:
    """Names the first layer whose output is not finite, going forward; else the last whose gradient is not; else None.

    loss_of: computes the loss with `model`, eager, so that every layer is called
    """
    first: list[str] = []

    def look(name: str, output: Any) -> None:
        if not first and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
            first.append(name)

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
        for name, module in model.named_modules()
        if name and not any(module.children())
    ]
    loss = loss_of()
    for hook in hooks:
        hook.remove()
    if first:
        return f"the output of {first[0]}"
    if not bool(torch.isfinite(loss)):
        return "the loss, though all layers' outputs are finite"
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    for (name, _), gradient in zip(reversed(named), reversed(gradients), strict=True):
        if gradient is not None and not bool(torch.isfinite(gradient).all()):
            return f"the gradient of {name}"
    return None
