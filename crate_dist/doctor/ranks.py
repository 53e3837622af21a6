"""A rank of a cluster, on one device: the engine over a process group that partitions as 32 ranks do and sends nothing.

The step is what such a rank computes and what its host does for it, without the network; its messages are counted.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from crate_dist.config import Recipe
from crate_dist.doctor.contestants import called, free, made, prepare
from crate_dist.doctor.fake_cluster import counted, fake_cluster
from crate_dist.doctor.speed import memory
from crate_dist.doctor.stage import Finding, Setting
from crate_dist.doctor.timing import host_median_s, in_turns, median_s, synchronize
from crate_dist.doctor.waits import STEPS, judged, recipe_of, steps_of
from crate_dist.launching.memory import parameters, step_bytes

RANKS = 32
ANOTHER_S = 10.0
"""Seconds that must be left to begin a further model."""
SIZES = (("crate_base", 64), ("crate_large", 64))
"""Models, and a rank's share of their global batch of 2048."""


def examine(setting: Setting) -> Iterator[Finding]:
    """Yields waits, messages, time and memory of a step of each model over 32 ranks."""
    prepare(setting)
    device = torch.device("cuda", 0) if setting.device == "cuda" else torch.device("cpu")
    for arch, micro_batch in [("crate_base", 8)] if setting.small else SIZES:
        recipe = recipe_of(micro_batch, setting, arch)
        if arch != SIZES[0][0] and setting.left_s < ANOTHER_S:
            yield Finding(f"{called(recipe)}, rank 0 of {RANKS}", "left out", note="no time left")
            continue
        yield from one_rank(recipe, device)
        free(device)


def one_rank(recipe: Recipe, device: torch.device) -> Iterator[Finding]:
    """Yields what a step of one rank's engine shows."""
    micro_batch = recipe.train.micro_batch
    name = f"{recipe.model.arch} at {micro_batch}, rank 0 of {RANKS}"
    with fake_cluster(RANKS):
        step = steps_of(made(recipe, device, ranks=RANKS)[0])
        for _ in range(2):
            step()
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with counted() as found:
            for _ in range(STEPS):
                step()
        synchronize(device)
        yield judged(name, found, accumulation=1)
        sent = sum(message.sent for message in found.messages) / STEPS
        kinds = {kind: number / STEPS for kind, number in found.kinds().items()}
        facts = {"messages_per_step": kinds, "bytes": sorted({message.bytes for message in found.messages})}
        note = ", ".join(f"{number:g} {kind.strip('_')}" for kind, number in kinds.items())
        per_weight = sent / parameters(recipe)
        yield Finding(
            f"{name}: sent per step", sent / 1e6, "MB", "", None, f"{per_weight:.2f} bytes per weight: {note}", facts
        )
        if device.type == "cuda":
            yield memory(
                f"{name}: peak memory", torch.cuda.max_memory_allocated(), step_bytes(recipe, micro_batch, RANKS)
            )
        taken = in_turns({"": step}, device, rounds=4, calls=8 if device.type == "cuda" else 1)[""]
        said = "computing and queueing alone; nothing is sent"
        yield Finding(f"{name}: a step", 1000 * median_s(taken), "ms", note=said)
        yield Finding(f"{name}: host, to queue it", 1000 * host_median_s(step, device), "ms")
