"""Trains the recipe of a run folder, from wherever its newest checkpoint stands.

    python -m crate_dist.train --arch crate_tiny --data /data/imagenet-shards

starts one process; under torchrun or srun the same line is one rank of many. launch/local.py and launch/slurm.py
start it for you.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from crate_dist.checkpoint.loading import CheckpointError
from crate_dist.config import Recipe, RecipeError
from crate_dist.data.index import ShardError
from crate_dist.data.workers import open_server
from crate_dist.distributed import (
    PortIsTaken,
    World,
    detect_world,
    exit_at_once,
    gather_objects,
    init_distributed,
    is_first_start,
    leave_distributed,
)
from crate_dist.launching.options import add_recipe_arguments, default_run_dir, recipe_from
from crate_dist.launching.preflight import check_that_no_job_waits
from crate_dist.run.exit_status import LOST_THE_RUN, STOPPED, TRY_AGAIN
from crate_dist.run.faults import judged, may_pass
from crate_dist.run.folder import RunFolder, read_recipe
from crate_dist.run.lock import LostTheRun, RunIsLocked, RunLock, Tenure
from crate_dist.training.engine import NotFinite
from crate_dist.training.interrupt import Interrupt, ending_at_once
from crate_dist.training.metrics import TooManyBadSamples, start_logging
from crate_dist.training.startup import Startup
from crate_dist.training.trainer import Trainer, TrainResult
from crate_dist.training.watchdog import Watchdog

EXPECTED_ERRORS = (RecipeError, RunIsLocked, ShardError, CheckpointError, NotFinite, TooManyBadSamples)
"""What a person can act on: shown as a message, without a traceback."""

_LOCKING_S = 120.0
"""More than it takes rank 0, which the others wait for, to see that the holder of a lock is dead."""


def train(
    run_dir: Path, recipe: Recipe | None = None, start_over: bool = False, accept_changed_data: bool | str = False
) -> TrainResult:
    """Runs this process as one rank until the recipe is complete. Resumes by itself. A collective.

    recipe: opens the run folder with it, on rank 0; None: the folder has been opened, and knows its recipe
    start_over: sets aside what the folder holds; not when SLURM or torchrun starts the same job again
    accept_changed_data: goes on though the data are not those of the checkpoint; a digest: if they are those of it

    Raises
    ------
    RecipeError, RunIsLocked, ShardError, CheckpointError: before the first step, for what cannot work
    NotFinite, TooManyBadSamples: in the middle, with the checkpoints before it intact
    LostTheRun: in the middle, when another job has taken over the run folder
    ToldToStop: a signal came before the first step, and there was nothing to save
    """
    startup = Startup()
    open_server()
    startup.mark("imports")
    folder, world = RunFolder(Path(run_dir)), detect_world()
    safety = (recipe or read_recipe(folder.path)).safety
    with ending_at_once():
        device = init_distributed(world, timeout_s=safety.hang_timeout_s + _LOCKING_S)
    startup.mark("process group")
    try:
        with (
            Interrupt() as interrupt,
            _folder_in_hand(folder, recipe, world, start_over) as (resolved, tenure),
            Watchdog(world, resolved.safety.hang_timeout_s, folder.log_file(world.rank), interrupt) as watchdog,
        ):
            startup.mark("run folder")
            together = interrupt, watchdog, startup, tenure
            return Trainer(folder, resolved, world, device, *together, accept_changed_data).run()
    finally:
        leave_distributed()


@contextmanager
def _folder_in_hand(
    folder: RunFolder, recipe: Recipe | None, world: World, start_over: bool
) -> Iterator[tuple[Recipe, Tenure]]:
    """Rank 0 locks the run folder and opens it, the others learn how that went. Gives the folder's recipe.

    Raises
    ------
    RecipeError, RunIsLocked: on every rank
    """
    with ExitStack() as stack:
        problem: Exception | None = None
        tenure = Tenure()
        if world.is_main:
            try:
                starts_over = start_over and is_first_start()
                if recipe is not None:
                    if not starts_over:
                        folder.check(recipe)
                    folder.make()
                lock = RunLock(folder.lock, (recipe or read_recipe(folder.path)).safety.lease_s)
                tenure = stack.enter_context(lock).tenure
                check_that_no_job_waits(folder)
                if starts_over:
                    folder.set_aside(tenure.check)
                if recipe is not None:
                    folder.open(recipe, tenure.check)
            except (RecipeError, RunIsLocked) as error:
                problem = judged(error)
            except OSError as error:
                problem = RecipeError(f"cannot lock the run folder {folder.path}: {error}")
                problem.__cause__ = error
                judged(problem)
        problem = gather_objects(problem)[0]
        if problem is not None:
            raise problem
        start_logging(folder, world)
        yield read_recipe(folder.path), tenure


def main(argv: list[str] | None = None) -> int:
    """Command line: resolves a recipe, opens the run folder, trains."""
    parser = argparse.ArgumentParser(prog="python -m crate_dist.train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_recipe_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        recipe = recipe_from(arguments)
        run_dir = arguments.run_dir or default_run_dir(recipe)
        result = train(run_dir, recipe, arguments.start_over, arguments.accept_changed_data)
    except EXPECTED_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return TRY_AGAIN if may_pass(error) else 1
    except LostTheRun as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return LOST_THE_RUN
    except PortIsTaken as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return TRY_AGAIN
    except Exception as error:
        if not may_pass(error):
            raise
        traceback.print_exc()
        return TRY_AGAIN
    return 0 if result.finished else STOPPED


if __name__ == "__main__":
    exit_at_once(main)
