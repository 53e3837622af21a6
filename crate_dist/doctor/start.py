"""Looks at the node for a few seconds before ranks of a job meet: what they would otherwise learn minutes later.

Nothing that training could live with ends a start: it is a warning in the log. What cannot be looked at in time, on a
file system that does not answer, is left.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from crate_dist.doctor import basics
from crate_dist.doctor.nvidia import device_files, driver_version, is_older, oldest_driver
from crate_dist.doctor.stage import Finding
from crate_dist.errors import UserError
from crate_dist.run.folder import read_recipe
from crate_dist.world import World

logger = logging.getLogger(__name__)

PATIENCE_S = 5.0


class NodeIsUnfit(UserError):
    """This node's ranks could not train, and another start would not mend it."""


def look_before_start(run_dir: Path, world: World) -> None:
    """Warns of what is amiss on this node; at most PATIENCE_S seconds. For one rank of each node.

    Raises NodeIsUnfit: the node has GPUs for this job, and torch cannot use them: it would train on the CPU.
    """
    problem = unusable_device()
    if problem and not torch.version.cuda and not read_recipe(run_dir).cluster.gpus_per_node:
        problem = ""  # it is to train on the CPU
    if problem:
        try:
            torch.cuda.init()
        except Exception as error:  # a broken device is tried again, on another node: run/faults.py knows its texts
            raise NodeIsUnfit(f"{problem} ({str(error).strip().splitlines()[0]})") from error
        raise NodeIsUnfit(problem)

    def look() -> None:
        try:
            for finding in _findings(run_dir, world):
                if finding.passed is False:
                    logger.warning(
                        "%s: %s %s (expected: %s); %s",
                        *(finding.name, finding.value, finding.unit, finding.expected, finding.note),
                    )
        except Exception as error:  # whatever it is: the start will meet it, or need not mind
            logger.warning("could not look at this node: %s: %s", type(error).__name__, error)

    thread = threading.Thread(target=look, name="look before the start", daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    if thread.is_alive():
        logger.warning("a look at this node is not through after %g s: does a file system hang?", PATIENCE_S)


def unusable_device() -> str:
    """Says why torch cannot use the GPUs that this process is to have; "": it can, or is to have none."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = chosen is not None and chosen.strip() in ("", "-1", "NoDevFiles")
    cuda = torch.version.cuda
    if hidden or not device_files() or torch.cuda.is_available():
        return ""
    there = f"there are GPUs ({', '.join(path.name for path in device_files())})"
    if not cuda:
        return (
            f"{there}, and torch {torch.__version__} is built for the CPU alone: install its build for CUDA; to train "
            "on the CPU, hide them with CUDA_VISIBLE_DEVICES= or ask for none with --gpus-per-node 0"
        )
    driver, oldest = driver_version(), oldest_driver(cuda)
    if driver and oldest and is_older(driver, oldest):
        return (
            f"the driver {driver} is too old for torch {torch.__version__}, which is built with CUDA {cuda} and needs "
            f"{oldest} or newer: update the driver, or install a build of torch for an older CUDA"
        )
    return (
        f"{there}, and torch {torch.__version__} with CUDA {cuda} cannot use them (driver "
        f"{driver or 'unknown'}, CUDA_VISIBLE_DEVICES={chosen}): does nvidia-smi work here? To train on the CPU, "
        "hide them with CUDA_VISIBLE_DEVICES="
    )


def _findings(run_dir: Path, world: World) -> Iterator[Finding]:
    recipe, ranks = read_recipe(run_dir), world.local_world_size
    cuda = torch.cuda.is_available()
    yield basics.room("run folder", run_dir, 2, "make room, or saving will fail")
    if cuda:
        yield basics.shared_memory(ranks)
        yield basics.memory(ranks)
        yield basics.c_compiler(needed=bool(recipe.train.compile))
        # SLURM binds each task to cores of its own, or all of a node to the same.
        own = world.launcher == "slurm" and len(os.sched_getaffinity(0)) < (os.cpu_count() or 1)
        yield basics.cores(1 if own else ranks, recipe.data.workers, binding=True)
    yield basics.clock(run_dir)
