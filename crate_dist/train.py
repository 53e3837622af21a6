"""Trains the recipe of a run folder, from wherever its newest checkpoint stands.

    python -m crate_dist.train --arch crate_tiny --data /data/imagenet-shards
    python -m crate_dist.train --run-dir runs/crate_tiny

The first starts one process; under torchrun or srun the same line is one rank of many. launch/local.py and
launch/slurm.py start it for you. The second goes on with a run by the recipe that its folder holds.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from crate_dist.arguments import Parser
from crate_dist.launching.options import default_run_dir, recipe_from, recipe_parser, site_from


def _parser() -> Parser:
    return recipe_parser(__doc__, "python -m crate_dist.train", required=False)


if __name__ == "__main__":
    _parser().parse_args()  # what ends here, such as --help, does not wait for the imports below

import torch

from crate_dist.config import Recipe
from crate_dist.data.workers import open_server
from crate_dist.distributed import exit_at_once, gather_objects, init_distributed, leave_distributed, set_timeout
from crate_dist.errors import UserError
from crate_dist.launching.opening import opened
from crate_dist.launching.ranks import visible_gpus
from crate_dist.run.exit_status import LOST_THE_RUN, STOPPED, TRY_AGAIN
from crate_dist.run.faults import judged, may_pass
from crate_dist.run.folder import RunFolder, read_recipe
from crate_dist.run.lock import HANDED_OVER, LostTheRun, Tenure
from crate_dist.terminal import complain
from crate_dist.training.interrupt import Interrupt, ending_at_once
from crate_dist.training.rank_log import log_to_file, start_logging
from crate_dist.training.startup import Startup
from crate_dist.training.trainer import Trainer, TrainResult
from crate_dist.training.watchdog import COMPILING, Watchdog
from crate_dist.watching.report import report
from crate_dist.world import World, detect_world, is_first_start

logger = logging.getLogger(__name__)

_LOCKING_S = 120.0
"""More than it takes rank 0, which the others wait for, to see that the holder of a lock is dead."""


def train(
    run_dir: Path,
    *,
    accept_changed_data: bool | str = False,
    recipe: Recipe | None = None,
    start_over: bool = False,
    by_a_person: bool = False,
) -> TrainResult:
    """Runs this process as one rank until the recipe of the run folder is complete. Resumes by itself. A collective.

    accept_changed_data: goes on though the data are not those of the checkpoint; a digest: if they are those of it
    recipe, start_over: with which rank 0 opens the folder first, as a launcher does; None: a launcher has done so
    by_a_person: no launcher starts it, so that who asked the run to stop wants it to go on now

    Raises
    ------
    RecipeError, RunIsLocked, ShardError, CheckpointError: before the first step, for what cannot work
    NotFinite, TooManyBadSamples: in the middle, with the checkpoints before it intact
    LostTheRun: when another job has taken over the run folder
    ToldToStop: a signal came before the first step, and there was nothing to save
    """
    startup = Startup()
    open_server()
    startup.mark("imports")
    folder, world = RunFolder(Path(run_dir)), detect_world()
    safety = (recipe or read_recipe(folder.path)).safety
    with ending_at_once():
        longest_s = COMPILING * safety.hang_timeout_s + _LOCKING_S
        device = init_distributed(world, safety.hang_timeout_s + _LOCKING_S, longest_s)
        interrupt = Interrupt()  # here, since it waits for all ranks too
    startup.mark("process group")
    try:
        with interrupt, _opened_by_rank_0(folder, recipe, world, start_over, by_a_person) as tenure:
            start_logging(folder, world)
            if device.type == "cpu" and world.local_rank == 0:
                warn_of_idle_gpus()
            recipe = read_recipe(folder.path)
            with Watchdog(world, recipe.safety.hang_timeout_s, folder.log_file(world.rank), interrupt) as watchdog:
                set_timeout(longest_s)  # from here on the watchdog is the one that does not wait so long
                startup.mark("run folder")
                together = interrupt, watchdog, startup, tenure
                result = Trainer(folder, recipe, world, device, *together, accept_changed_data).run()
                if world.is_main:
                    log_report(folder)
                return result
    finally:
        leave_distributed()


def log_report(folder: RunFolder) -> None:
    """Logs the report on a run that has ended here. That it cannot be made is no reason for anything."""
    try:
        logger.info("%s", report(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("no report: %s: %s", type(error).__name__, error)


def warn_of_idle_gpus() -> None:
    """Warns where there are GPUs that torch cannot use: these ranks compute on the CPU."""
    if gpus := visible_gpus():
        logger.warning(
            "TRAINING ON THE CPU, though %d GPU(s) are to be seen: torch %s cannot use them; install its build for "
            "their CUDA (python -m crate_dist.doctor says more), or hide them with CUDA_VISIBLE_DEVICES=",
            *(gpus, torch.__version__),
        )


@contextmanager
def _opened_by_rank_0(
    folder: RunFolder, recipe: Recipe | None, world: World, start_over: bool, by_a_person: bool
) -> Iterator[Tenure]:
    """Gives the tenure of rank 0, which holds the lock of the run folder; the other ranks learn how that went.

    Raises RecipeError, RunIsLocked, LostTheRun: on every rank.
    """
    with ExitStack() as stack:
        problem, tenure = None, Tenure()
        if world.is_main:
            try:
                first = is_first_start()
                lock = opened(folder, recipe, start_over and first, by_a_person=by_a_person and first)
                tenure = stack.enter_context(lock).tenure
            except UserError as error:
                problem = judged(error)
        problem = gather_objects(problem)[0]
        if problem is not None:
            raise problem
        yield tenure


def main(argv: list[str] | None = None) -> int:
    """Trains what the command line names, and returns the exit status."""
    arguments = (parser := _parser()).parse_args(argv)
    run_dir, recipe = arguments.run_dir, None
    given = {name for name, value in vars(arguments).items() if value != parser.get_default(name)}
    if not given & {"arch", "config", "run_dir"}:
        parser.error("--arch or --config is required, or --run-dir, which goes on with that run by its own recipe")
    try:
        if given - {"run_dir", "accept_changed_data"}:
            if not given & {"arch", "config"}:
                arguments.config = RunFolder(run_dir).recipe_file
            site = site_from(arguments)
            recipe = recipe_from(arguments, site)
            run_dir = run_dir or default_run_dir(recipe, site)
        accepted, over = arguments.accept_changed_data, arguments.start_over
        alone = HANDED_OVER not in os.environ
        result = train(run_dir, accept_changed_data=accepted, recipe=recipe, start_over=over, by_a_person=alone)
    except LostTheRun as error:
        complain(error)
        return LOST_THE_RUN
    except Exception as error:
        log_to_file(error)
        if isinstance(error, UserError):
            complain(error)
        elif may_pass(error):
            traceback.print_exc()
        else:
            raise
        return TRY_AGAIN if may_pass(error) else 1
    return 0 if result.finished else STOPPED


if __name__ == "__main__":
    exit_at_once(main)
