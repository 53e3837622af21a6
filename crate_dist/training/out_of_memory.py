"""Says what would fit, where a step did not fit into the memory of the GPU."""

from __future__ import annotations

import torch

from crate_dist.config import Recipe
from crate_dist.errors import UserError
from crate_dist.launching.memory import largest_micro_batch, least_of, step_bytes
from crate_dist.models.costs import NotKnown


class OutOfMemory(UserError):
    """The device has no room for a step; the cause is torch's error, which may pass: another program may have it."""


def out_of_memory(recipe: Recipe, micro_batch: int, world_size: int, device: torch.device) -> OutOfMemory:
    """Makes the error of a step with micro-batches of `micro_batch` images that `device` had no room for."""
    free, total = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_reserved(device)
    return OutOfMemory(explanation(recipe, micro_batch, world_size, (free + ours) / 1e9, total / 1e9))


def explanation(recipe: Recipe, micro_batch: int, world_size: int, available_gb: float, total_gb: float) -> str:
    """Says what did not fit and what would. available_gb: what the device has, less what other programs hold of it"""
    taken = f", of which other programs hold {total_gb - available_gb:.1f}" if total_gb - available_gb > 2 else ""
    has = f"the device has {total_gb:.1f} GB{taken}"
    try:
        need = step_bytes(recipe, micro_batch, world_size) / 1e9
    except NotKnown as unknown:
        return f"out of memory: {has}; {unknown}; a smaller train.micro_batch than {micro_batch} needs less"
    share = recipe.train.global_batch // world_size
    smaller = next((n for n in range(micro_batch - 1, 0, -1) if share % n == n % recipe.train.group == 0), 0)
    fits = min(smaller, largest_micro_batch(recipe, world_size, available_gb * 1e9))
    remedy = (
        f"--set train.micro_batch={fits} should fit, and changes no result: the global batch stays "
        f"{recipe.train.global_batch}"
        if fits
        else f"not even {least_of(recipe)} would fit: free the device, or take a smaller model"
    )
    return f"out of memory: a micro-batch of {micro_batch} images needs about {need:.1f} GB, and {has}; {remedy}"
