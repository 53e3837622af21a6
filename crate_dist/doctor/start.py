"""Looks at the node for a few seconds before ranks of a job meet: what they would otherwise learn minutes later.

What training could live with is a warning in the log. It ends a start where it is of this node alone, and the batch
script says that the job may leave it for another. What cannot be looked at in time, on a file system that does not
answer, is left.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from crate_dist.config import Recipe
from crate_dist.data.workers import workers_of_rank
from crate_dist.doctor import basics
from crate_dist.doctor.nvidia import device_files, driver_version, gpu_faults, is_older, oldest_driver
from crate_dist.doctor.stage import Finding
from crate_dist.errors import UserError
from crate_dist.run.folder import read_recipe
from crate_dist.world import World, is_first_start

logger = logging.getLogger(__name__)

PATIENCE_S = 5.0


_WRONG_BY_S = 60.0
"""Of a clock, what is no file server's delay."""
_SOME_GB = 0.1


class NodeIsUnfit(UserError):
    """This node's ranks could not train, and another start would not mend it."""


class NodeIsAtFault(UserError):
    """It is this node: the job may leave it, and would do better on another."""


def look_before_start(run_dir: Path, world: World) -> None:
    """Warns of what is amiss on this node; at most PATIENCE_S seconds. For one rank of each node.

    Raises
    ------
    NodeIsUnfit: torch cannot use the GPUs that the node has, or has none though the job asked for them: it would train
        on the CPU
    NodeIsAtFault: that, or less, where other nodes do not have it, as far as can be seen, and can be had
    """
    may_leave = os.environ.get("CRATE_MAY_LEAVE_NODES") == "yes"
    # What has worked elsewhere, or may do at this moment, is not of all nodes.
    compared = world.world_size > world.local_world_size or not is_first_start()
    problem = unusable_device()
    if not problem:
        problem = missing_device(run_dir)
    elif not torch.version.cuda and not read_recipe(run_dir).cluster.gpus_per_node:
        problem = ""  # it is to train on the CPU
    if problem:
        kind = NodeIsAtFault if may_leave and compared and torch.version.cuda else NodeIsUnfit
        try:
            torch.cuda.init()
        except Exception as error:  # a broken device is tried again, on another node: run/faults.py knows its texts
            raise kind(f"{problem} ({str(error).strip().splitlines()[0]})") from error
        raise kind(problem)

    faults: list[str] = []

    def look(findings: Callable[[], Iterator[Finding]], of_the_node: bool) -> None:
        try:
            for one in findings():
                if one.passed is False:
                    value = f"{one.value:,.1f} {one.unit}" if isinstance(one.value, float) else one.value
                    said = f"{one.name}: {value} (expected: {one.expected}); {one.note}"
                    logger.warning("%s", said)
                    if of_the_node:
                        faults.append(said)
        except Exception as error:  # whatever it is: the start will meet it, or need not mind
            logger.warning("could not look at this node: %s: %s", type(error).__name__, error)

    looks: list[tuple[Callable[[], Iterator[Finding]], bool]] = [(partial(_findings, run_dir, world), False)]
    looks += [(partial(_faults_of_the_node, run_dir, world, compared), True)] if may_leave else []
    threads = [threading.Thread(target=look, args=one, name="look before the start", daemon=True) for one in looks]
    ends_at = time.monotonic() + PATIENCE_S
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(ends_at - time.monotonic(), 0))
    if any(thread.is_alive() for thread in threads):
        logger.warning("a look at this node is not through after %g s: does a file system hang?", PATIENCE_S)
    if faults:
        raise NodeIsAtFault("; ".join(faults))


def unusable_device() -> str:
    """Says why torch cannot use the GPUs that this process is to have; "": it can, or is to have none."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = chosen is not None and chosen.strip() in ("", "-1", "NoDevFiles")
    cuda = torch.version.cuda
    if hidden or not device_files() or torch.cuda.is_available():
        return ""
    files = ", ".join(path.name for path in device_files())
    if not cuda:
        return (
            f"there are GPUs ({files}), and torch {torch.__version__} is built for the CPU alone: install its build "
            "for CUDA; to train on the CPU, hide them with CUDA_VISIBLE_DEVICES= or ask for none with --gpus-per-node 0"
        )
    driver, oldest = driver_version(), oldest_driver(cuda)
    if driver and oldest and is_older(driver, oldest):
        return (
            f"the driver {driver} is too old for torch {torch.__version__}, which is built with CUDA {cuda} and needs "
            f"{oldest} or newer: update the driver, or install a build of torch for an older CUDA"
        )
    return (
        f"there are GPUs ({files}), and torch {torch.__version__} with CUDA {cuda} cannot use them (driver "
        f"{driver or 'unknown'}, CUDA_VISIBLE_DEVICES={chosen}): does nvidia-smi work here? To train on the CPU, "
        "hide them with CUDA_VISIBLE_DEVICES="
    )


def missing_device(run_dir: Path) -> str:
    """Says that a run whose job asked for GPUs has none here; "": it has, asked for none, or somebody hides them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.cuda.is_available() or (chosen is not None and chosen.strip() in ("", "-1")):
        return ""
    if not (asked := read_recipe(run_dir).cluster.gpus_per_node):
        return ""
    node, cuda = os.environ.get("SLURMD_NODENAME", platform.node()), torch.version.cuda
    return (
        f"the job asked for {asked} GPU(s) of each node, and torch sees none on {node} (CUDA_VISIBLE_DEVICES="
        f"{chosen or 'unset'}, torch {torch.__version__}, {f'built with CUDA {cuda}' if cuda else 'for the CPU alone'})"
        ": it would train on the CPU. Does `nvidia-smi` list them there, in a job? A container needs to be given them, "
        "and torch a build for CUDA; --gpus-per-node 0 trains on the CPU"
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
        yield basics.cores(1 if own else ranks, workers_of_rank(recipe.data.workers, world.cores), binding=True)
    yield basics.clock(run_dir)


def _faults_of_the_node(run_dir: Path, world: World, compared: bool) -> Iterator[Finding]:
    """Finds what another node would not have."""
    recipe = read_recipe(run_dir)
    temporary = Path(os.environ.get("TMPDIR") or "/tmp")
    yield basics.room("temporary folder", temporary, _SOME_GB, "what is left there by others has to be removed")
    yield basics.clock(run_dir, _WRONG_BY_S)
    if compared:
        yield _data(recipe)
    if torch.cuda.is_available():
        if world.local_world_size > 1:
            yield basics.shared_memory(world.local_world_size, enough=0.1)
        wrong = gpu_faults()
        yield Finding("GPUs", "; ".join(wrong) or "no faults", "", "no faults", not wrong, "they need a reset, or more")


def _data(recipe: Recipe) -> Finding:
    """Looks whether the folder of the shards is mounted here."""
    root = recipe.data.find_root()
    there = not isinstance(root, Path) or (root / recipe.data.train_split).is_dir()
    return Finding("data folder", str(root) if there else f"no {root} here", "", "there", there, "is it mounted?")
