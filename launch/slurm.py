"""Trains a recipe on a SLURM cluster.

    python launch/slurm.py --arch crate_large --nodes 4
    python launch/slurm.py --arch crate_base --partition gpu --time 2-00:00:00 --seeds 0 1 2
    python launch/slurm.py --arch crate_base --grid optim.lr=1e-4,2e-4 --grid train.seed=0,1
    python launch/slurm.py --arch crate_tiny --dry-run

What the recipe's [cluster] table says can be said here too, and wins. Run it on the login node, from a file system
that the compute nodes share. A job that meets its time limit is requeued and goes on from the newest checkpoint of
its run folder; so does the same command, given again.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone's code, whichever else is installed
from crate_dist.arguments import positive, whole_number
from crate_dist.config import DATA_VARIABLE, ClusterSection, Recipe, RecipeError, build_recipe, derive_batch
from crate_dist.errors import UserError
from crate_dist.job import TrainJob
from crate_dist.launching.grid import Grid, add_grid_options, is_swept, read_grid, recipes_of, run_dirs_of, save_grid
from crate_dist.launching.memory import advice
from crate_dist.launching.opening import opened
from crate_dist.launching.options import recipe_parser
from crate_dist.launching.preflight import Preflight, folder_of_weights
from crate_dist.launching.sweep import look_at_all, plan, runs_table
from crate_dist.locations import is_private
from crate_dist.run.snapshot import Snapshot, prune
from crate_dist.slurm.executor import Executor, make_executor
from crate_dist.slurm.options import parse_minutes
from crate_dist.slurm.queue import largest_array
from crate_dist.world import VARIABLES

if TYPE_CHECKING:
    from submitit import Job


def main(argv: list[str] | None = None) -> int:
    """Checks, submits, says how to watch; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        grid = read_grid(arguments)
        recipes = _recipes(arguments, grid)
        runs = plan(grid, recipes, run_dirs_of(arguments, grid, recipes), arguments.start_over)
        due = [run for run in runs if not run.idle]
        if not due:
            print(f"{runs_table(grid, runs, [run.idle for run in runs])}\nnothing is left to do")
            return 0
        recipes, run_dirs = [run.recipe for run in due], [run.run_dir for run in due]
        weights = [folder_of_weights(recipe.train.init_from) for recipe in recipes if recipe.train.init_from]
        home, snapshot = _home(run_dirs), Snapshot.take()
        code = home / "code" / snapshot.digest
        executor = make_executor(recipes[0], home / "slurm" / "%j", run_dirs, code, weights)
        if arguments.max_parallel:
            executor.update_parameters(array_parallelism=arguments.max_parallel)
        if arguments.dry_run:
            _show(executor, recipes)
        if arguments.gpu_memory_gb:
            world_size = recipes[0].cluster.world_size
            train = recipes[0].train
            micro_batch, _ = derive_batch(train.global_batch, world_size, train.micro_batch)
            print(advice(recipes[0], micro_batch, world_size, arguments.gpu_memory_gb))
        found = look_at_all(recipes, run_dirs, arguments.start_over, arguments.accept_changed_data)
        about = {run.folder.path: "goes on" if run.resumes else "new" for run in found}
        if not arguments.dry_run:
            jobs = _submit(executor, recipes, found, snapshot, home / "code", arguments.start_over)
            about = {path: f"{job.job_id} ({about[path]})" for path, job in zip(about, jobs, strict=True)}
            if is_swept(arguments):
                save_grid(run_dirs[0].parent, grid, runs[0].recipe)
            _say(jobs, found)
        if grid:
            print(runs_table(grid, runs, [run.idle or about[run.run_dir] for run in runs]))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = recipe_parser(__doc__, required=False)
    cluster = parser.add_argument_group("cluster", "each replaces the value of the recipe's [cluster] table")
    cluster.add_argument("--nodes", type=positive, metavar="N")
    cluster.add_argument("--gpus-per-node", type=whole_number(0), metavar="N", help="0: train on the CPU")
    cluster.add_argument("--tasks-per-node", type=positive, metavar="N", help="ranks [one per GPU]")
    cluster.add_argument("--cpus-per-task", type=positive, metavar="N")
    cluster.add_argument("--mem-gb", type=positive, metavar="GB", help="memory per node [all of it]")
    cluster.add_argument(
        "--time", type=parse_minutes, metavar="LIMIT", dest="time_min", help="minutes, or as 12:00:00 or 2-00:00:00"
    )
    cluster.add_argument("--partition", metavar="NAME")
    cluster.add_argument("--account", metavar="NAME")
    cluster.add_argument("--qos", metavar="NAME")
    cluster.add_argument("--constraint", metavar="FEATURES")
    cluster.add_argument(
        "--setup", action="append", metavar="LINE", help="shell line before the job; can be given several times"
    )
    cluster.add_argument(
        "--container",
        metavar="IMAGE",
        help="image for srun --container-image (pyxis), with python3 and this project's dependencies in it",
    )
    add_grid_options(parser).add_argument(
        "--max-parallel", type=positive, metavar="N", help="runs of the array that may be under way at a time [256]"
    )
    parser.add_argument(
        "--gpu-memory-gb", type=float, metavar="GB", help="say what the micro-batch needs of such a card, and what fits"
    )
    parser.add_argument("--dry-run", action="store_true", help="check, show script and recipe, and submit nothing")
    return parser


def _recipes(arguments: argparse.Namespace, grid: Grid) -> list[Recipe]:
    """Loads one recipe per run, with the flags in their [cluster] tables."""
    flags = {key: getattr(arguments, key, None) for key in ClusterSection.model_fields}
    given = {key: value for key, value in flags.items() if value is not None}
    if given.get("gpus_per_node") and "tasks_per_node" not in given:
        given["tasks_per_node"] = None  # one per GPU, whatever the recipe's CPU ranks are
    recipes = []
    for recipe in recipes_of(arguments, grid):
        for key, said in recipe.cluster.withheld.items():
            if key not in given:
                raise RecipeError(said)
        raw = recipe.model_dump()
        raw["cluster"] |= given
        recipes.append(build_recipe(raw, origin="the command line"))
    _check_cluster(recipes[0].cluster)
    return recipes


def _check_cluster(cluster: ClusterSection) -> None:
    if 0 < cluster.gpus_per_node < cluster.ranks_per_node:
        raise RecipeError(
            f"{cluster.ranks_per_node} tasks per node on {cluster.gpus_per_node} GPUs, and each rank needs its own; "
            f"--tasks-per-node {cluster.gpus_per_node} would do, or --gpus-per-node 0 to train on the CPU"
        )
    if cluster.signal_delay_s >= cluster.time_min * 60:
        raise RecipeError(
            f"a time limit of {cluster.time_min} minutes with a warning {cluster.signal_delay_s} s before it leaves no "
            f"time to train; --time {math.ceil(cluster.signal_delay_s / 60) + 1} or more, "
            "or --set cluster.signal_delay_s=SECONDS"
        )


def _home(run_dirs: Sequence[Path]) -> Path:
    """Returns where submitit's files and the code lie: in the run folder, those of an array beside its run folders.

    Raises RecipeError for a path that submitit would misread.
    """
    folder = run_dirs[0] if len(run_dirs) == 1 else run_dirs[0].parent
    misread = re.search(r"%[jtAa]|\\", str(folder))
    if misread:
        raise RecipeError(
            f"submitit and SLURM would read the {misread[0]} in {folder} as a pattern; give another --run-dir"
        )
    return folder


def _show(executor: Executor, recipes: Sequence[Recipe]) -> None:
    print(executor.script(len(recipes)))
    print(f"# {'-' * 20} recipe.toml{' of the first run' if len(recipes) > 1 else ''} {'-' * 20}")
    print(recipes[0].to_toml(), flush=True)


def _submit(
    executor: Executor,
    recipes: Sequence[Recipe],
    found: Sequence[Preflight],
    snapshot: Snapshot,
    code: Path,
    start_over: bool,
) -> list[Job[Any]]:
    if not shutil.which("sbatch"):
        raise RecipeError(
            "no sbatch on this machine: run this on a login node of the cluster, or `module load slurm` there; "
            "launch/local.py trains on this machine, and --dry-run shows what would be submitted"
        )
    _check_environment_goes_along(recipes[0])
    if len(found) > 1 and (most := largest_array()) and len(found) > most:
        raise RecipeError(
            f"{len(found):,} runs are more than an array of this cluster may have: MaxArraySize is {most}"
        )
    with ExitStack() as locks:
        for recipe, run in zip(recipes, found, strict=True):
            locks.enter_context(opened(run.folder, recipe, start_over, brief=True, lost=lambda why: None))
        snapshot.write(code)
        if len(found) == 1:  # another array's jobs may wait for what lies beside this one's runs
            prune(code, {*found[0].folder.record.snapshots(), snapshot.digest})
        _leave_other_jobs()
        jobs = executor.send([TrainJob(run.folder.path, run.accepted_data) for run in found])
        for job, run in zip(jobs, found, strict=True):
            if len(jobs) > 1:
                run.folder.slurm.mkdir(exist_ok=True)
                (run.folder.slurm / job.job_id).symlink_to(os.path.relpath(job.paths.folder, run.folder.slurm))
    return jobs


def _say(jobs: Sequence[Job[Any]], found: Sequence[Preflight]) -> None:
    """Says what was submitted, and how to watch it; of an array, what all of its runs have in common."""
    job_id = jobs[0].job_id.partition("_")[0]
    texts = [str(run).splitlines() for run in found]
    print("\n".join([f"{'job':<14}{job_id}", *(line for line in texts[0] if all(line in text for text in texts))]))
    print(f"{'to watch':<14}squeue --job {job_id}")
    print(f"{'':<14}tail -F {shlex.quote(str(jobs[0].paths.stdout))}")
    print(f"{'':<14}tensorboard --logdir {shlex.quote(str(found[0].folder.path.parent))}")
    print(f"{'to cancel':<14}scancel {job_id}")


def _check_environment_goes_along(recipe: Recipe) -> None:
    """Raises RecipeError when data whose location recipe.toml does not keep would be out of the job's sight."""
    exported = os.environ.get("SBATCH_EXPORT", "ALL").split(",")
    if is_private(recipe.data.find_root()) and not {"ALL", DATA_VARIABLE} & set(exported):
        raise RecipeError(
            f"SBATCH_EXPORT={os.environ['SBATCH_EXPORT']} keeps {DATA_VARIABLE} from the job, in which the location of "
            f"the data travels: unset SBATCH_EXPORT, or put {DATA_VARIABLE} among its names"
        )


def _leave_other_jobs() -> None:
    """Forgets the ranks and, inside a job, the job that this process belongs to: the new one would believe it."""
    job = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_") if "SLURM_JOB_ID" in os.environ else ()
    for name in list(os.environ):
        if (name.startswith(job) and name != "SLURM_CONF") or name in VARIABLES:
            del os.environ[name]


if __name__ == "__main__":
    sys.exit(main())
