"""Trains a recipe on a SLURM cluster.

    python launch/slurm.py --arch crate_large --nodes 4
    python launch/slurm.py --arch crate_base --partition gpu --time 2-00:00:00 --seeds 0 1 2
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

sys.path.append(str(Path(__file__).parents[1]))  # so that what a bare Python lacks is told by crate_dist
from crate_dist.arguments import positive, whole_number
from crate_dist.config import DATA_VARIABLE, ClusterSection, Recipe, RecipeError, build_recipe, derive_batch
from crate_dist.errors import UserError
from crate_dist.job import TrainJob
from crate_dist.launching.memory import advice
from crate_dist.launching.opening import opened
from crate_dist.launching.options import default_run_dir, recipe_from, recipe_parser
from crate_dist.launching.preflight import Preflight, folder_of_weights, preflight
from crate_dist.locations import is_private
from crate_dist.slurm.executor import Executor, make_executor
from crate_dist.slurm.options import parse_minutes
from crate_dist.watching.finding import runs_root
from crate_dist.watching.notify import add_options
from crate_dist.world import VARIABLES


def main(argv: list[str] | None = None) -> int:
    """Checks, submits, says how to watch; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        recipes = _recipes(arguments)
        run_dirs = _run_dirs(arguments, recipes)
        init_from = recipes[0].train.init_from
        weights = folder_of_weights(init_from) if init_from else None
        executor = make_executor(
            *(recipes[0], _submission_folder(run_dirs), run_dirs, weights),
            notify=arguments.notify,
            stuck_after_min=arguments.stuck_after,
            mail=arguments.mail,
        )
        if arguments.dry_run:
            _show(executor, recipes)
        if arguments.gpu_memory_gb:
            world_size = recipes[0].cluster.world_size
            train = recipes[0].train
            micro_batch, _ = derive_batch(train.global_batch, world_size, train.micro_batch)
            print(advice(recipes[0], micro_batch, world_size, arguments.gpu_memory_gb))
        found = [
            preflight(recipe, recipe.cluster.world_size, run_dir, arguments.start_over, arguments.accept_changed_data)
            for recipe, run_dir in zip(recipes, run_dirs, strict=True)
        ]
        if not arguments.dry_run:
            _submit(executor, recipes, found, arguments.start_over)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = recipe_parser(__doc__)
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
    add_options(parser, mail=True)
    parser.add_argument(
        "--seeds",
        type=whole_number(0),
        nargs="+",
        metavar="N",
        help="an array of runs that differ in the seed, a folder for each",
    )
    parser.add_argument(
        "--gpu-memory-gb", type=float, metavar="GB", help="say what the micro-batch needs of such a card, and what fits"
    )
    parser.add_argument("--dry-run", action="store_true", help="check, show script and recipe, and submit nothing")
    return parser


def _recipes(arguments: argparse.Namespace) -> list[Recipe]:
    """Loads one recipe per seed, with the flags in their [cluster] tables."""
    seeds: list[int | None] = arguments.seeds or [arguments.seed]
    if arguments.seeds and arguments.seed is not None:
        raise RecipeError("--seed and --seeds: give one of them")
    if len(set(seeds)) < len(seeds):
        raise RecipeError(f"--seeds {' '.join(map(str, seeds))}: the same seed twice would be the same run twice")
    flags = {key: getattr(arguments, key, None) for key in ClusterSection.model_fields}
    given = {key: value for key, value in flags.items() if value is not None}
    if given.get("gpus_per_node") and "tasks_per_node" not in given:
        given["tasks_per_node"] = None  # one per GPU, whatever the recipe's CPU ranks are
    recipes = []
    for seed in seeds:
        arguments.seed = seed
        recipe = recipe_from(arguments)
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


def _run_dirs(arguments: argparse.Namespace, recipes: Sequence[Recipe]) -> list[Path]:
    given: Path | None = arguments.run_dir
    if given is None:
        run_dirs = [default_run_dir(recipe) for recipe in recipes]
    elif arguments.seeds:
        run_dirs = [given / f"seed{recipe.train.seed}" for recipe in recipes]
    else:
        run_dirs = [given]
    return [run_dir.expanduser().absolute() for run_dir in run_dirs]


def _submission_folder(run_dirs: Sequence[Path]) -> Path:
    """Returns submitit's one folder for all jobs of an array: it lies beside their run folders.

    Raises RecipeError for a path that submitit would misread.
    """
    folder = (run_dirs[0] if len(run_dirs) == 1 else run_dirs[0].parent) / "slurm"
    misread = re.search(r"%[jtAa]|\\", str(folder))
    if misread:
        raise RecipeError(
            f"submitit and SLURM would read the {misread[0]} in {folder} as a pattern; give another --run-dir"
        )
    return folder / "%j"


def _show(executor: Executor, recipes: Sequence[Recipe]) -> None:
    print(executor.script(len(recipes)))
    for recipe in recipes:
        print(f"# {'-' * 20} recipe.toml{f', seed {recipe.train.seed}' if len(recipes) > 1 else ''} {'-' * 20}")
        print(recipe.to_toml(), flush=True)


def _submit(executor: Executor, recipes: Sequence[Recipe], found: Sequence[Preflight], start_over: bool) -> None:
    if not shutil.which("sbatch"):
        raise RecipeError(
            "no sbatch on this machine: run this on a login node of the cluster, or `module load slurm` there; "
            "launch/local.py trains on this machine, and --dry-run shows what would be submitted"
        )
    _check_environment_goes_along(recipes[0])
    with ExitStack() as locks:
        for recipe, run in zip(recipes, found, strict=True):
            locks.enter_context(opened(run.folder, recipe, start_over, brief=True, lost=lambda why: None))
        _leave_other_jobs()
        jobs = executor.send([TrainJob(run.folder.path, run.accepted_data) for run in found])
        for job, run in zip(jobs, found, strict=True):
            if len(jobs) > 1:
                run.folder.slurm.mkdir(exist_ok=True)
                (run.folder.slurm / job.job_id).symlink_to(os.path.relpath(job.paths.folder, run.folder.slurm))
    for job, run in zip(jobs, found, strict=True):
        print(f"{'job':<14}{job.job_id}\n{run}")
    job_id = jobs[0].job_id.partition("_")[0]
    first = found[0].folder.path
    array = job_id if first.parent == runs_root().absolute() else first.parent  # there are other runs beside it
    runs = shlex.quote(str(first if len(found) == 1 else array))
    print(f"{'to watch':<14}python launch/status.py {runs} --watch")
    print(f"{'':<14}squeue --job {job_id}")
    for job in jobs:
        print(f"{'':<14}tail -F {shlex.quote(str(job.paths.stdout))}")
    print(f"{'':<14}tensorboard --logdir {shlex.quote(str(found[0].folder.path.parent))}")
    print(f"{'to stop':<14}python launch/status.py stop {runs}")
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
