"""Shows what a run will need before it starts, and whatever else a launcher says. Imports no torch."""

from __future__ import annotations

import os
import shutil
import sys

from crate_dist.config import Recipe
from crate_dist.launching.memory import checkpoint_bytes, step_bytes
from crate_dist.launching.preflight import Preflight
from crate_dist.models.costs import NotKnown
from crate_dist.terminal import labelled, near
from crate_dist.wording import size


def show(text: str, verbatim: bool = False) -> None:
    """Prints; a reader that has gone, as `| head` does, ends no launcher and changes no exit status.

    verbatim: also on a terminal with all its paths in full, as in a script
    """
    try:
        print(text if verbatim else near(text), flush=True)  # noqa: T201
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to come goes nowhere


def summary(recipe: Recipe, run: Preflight) -> str:
    """Returns lines on the data, the batch, the memory that a rank needs, and the room that checkpoints take."""
    of = "of a rank's GPU, by estimate (--gpu-memory-gb GB says what would fit)"
    of = of if recipe.cluster.gpus_per_node else "of each rank for the step alone, by estimate"
    saved, more = checkpoint_bytes(recipe, run.classes), ""
    try:
        memory = f"about {size(step_bytes(recipe, run.micro_batch, run.world_size))} {of}"
    except NotKnown as unknown:
        memory, more = str(unknown), "more than "
    kept = recipe.checkpoint.keep + 1  # the best one
    there = next(path for path in (run.folder.path, *run.folder.path.parents) if path.exists())
    free = shutil.disk_usage(there).free
    # One more is written before the oldest goes.
    short = "; TOO LITTLE, and saves will fail" if free < (kept + 1) * saved else ""
    lines = [
        ("memory", memory),
        (
            "checkpoints",
            f"{more}{size(saved)} every {recipe.checkpoint.every_steps} steps; the newest {recipe.checkpoint.keep} and "
            f"the best are kept: {more}{size(kept * saved)} of {size(free)} free{short}",
        ),
    ]
    return "\n".join([str(run), *(labelled(name, text) for name, text in lines)])
