"""Opens a run folder with a recipe, under its lock: the one way in which a recipe gets there. Imports no torch."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from crate_dist.config import Recipe, RecipeError
from crate_dist.files import FULL
from crate_dist.run.folder import RunFolder, read_recipe
from crate_dist.run.lock import RunLock
from crate_dist.run.record import new_run_id
from crate_dist.slurm.queue import NoAnswer, my_jobs

logger = logging.getLogger(__name__)


@contextmanager
def opened(
    folder: RunFolder,
    recipe: Recipe | None,
    start_over: bool = False,
    brief: bool = False,
    lost: Callable[[str], None] | None = None,
    by_a_person: bool = True,
) -> Iterator[RunLock]:
    """Holds the lock of a run folder that was opened with a recipe, so that no other start changes it.

    recipe: what the folder is opened with; None: a launcher has done that
    start_over: sets aside first what the folder holds
    brief, lost: of the lock, as RunLock has them
    by_a_person: who asked the run to stop wants it to go on now

    Raises
    ------
    RecipeError: a job waits in SLURM's queue to work there; or as RunFolder.open says
    RunIsLocked, LostTheRun: another job works there
    """
    with ExitStack() as stack:
        try:
            if recipe:
                if not start_over:
                    folder.check(recipe)  # before a lock is put into a folder that is no run
                folder.make()
            lease_s = (recipe or read_recipe(folder.path)).safety.lease_s
            lock = stack.enter_context(RunLock(folder.lock, lease_s, brief, lost))
            check_that_no_job_waits(folder)
            if recipe and start_over and (aside := folder.set_aside(lock.check)):
                logger.warning("what stood in %s is in %s now", folder.path, aside)
            if recipe:
                folder.open(recipe, lock.check)
                if start_over and recipe.checkpoint.find_mirror():
                    folder.record.note_run_id(new_run_id(), instead=True)
            lock.check()
            if by_a_person:
                folder.stop_request.unlink(missing_ok=True)
        except OSError as error:
            remedy = (
                "make room there, or let --run-dir name another" if error.errno in FULL else "--run-dir names another"
            )
            raise RecipeError(
                f"cannot lock the run folder {folder.path}: {FULL.get(error.errno or 0, error.strerror)}; {remedy}"
            ) from error
        yield lock


def check_that_no_job_waits(folder: RunFolder) -> None:
    """Asks SLURM, where there is one, for the folder's jobs, unless this process belongs to one of them.

    Raises RecipeError: one of them waits, or runs; or SLURM does not answer.
    """
    jobs = set(folder.jobs())
    mine = {os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_ARRAY_JOB_ID", "")}
    if not jobs or {job.partition("_")[0] for job in jobs} & mine or not shutil.which("squeue"):
        return
    try:
        queue = my_jobs()
    except NoAnswer as error:
        raise RecipeError(
            f"SLURM does not say whether a job of this folder ({', '.join(sorted(jobs))}) still waits: {error}"
        ) from error
    for job in queue:
        if jobs & {job.number, job.name}:
            raise RecipeError(
                f"job {job.name}, which is to work in {folder.path}, is {job.state.lower()} ({job.reason}); "
                f"wait for it, scancel {job.name}, or give another --run-dir"
            )
