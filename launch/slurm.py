"""Trains a recipe on a SLURM cluster.

    python launch/slurm.py --arch crate_large --nodes 4
    python launch/slurm.py --arch crate_base --partition gpu --time 2-00:00:00 --seeds 0 1 2
    python launch/slurm.py --arch crate_base --grid optim.lr=1e-4,2e-4 --grid train.seed=0,1
    python launch/slurm.py --arch crate_tiny --dry-run

What the recipe's [cluster] table says can be said here too, and wins. What is the same for all your jobs on a cluster
(partition, account, modules, how GPUs are asked for) is said once, in a site file: `--site-template` prints one.

    mkdir -p ~/.config/crate-dist && python launch/slurm.py --site-template > ~/.config/crate-dist/site.toml
    python launch/slurm.py --arch crate_base --sbatch reservation=course --exclude 'n[3-5]' --test-only

Run it on the login node, from a file system that the compute nodes share. A job that meets its time limit is requeued
and goes on from the newest checkpoint of its run folder; so does the same command, given again.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone's code, whichever else is installed
from crate_dist.arguments import positive
from crate_dist.config import DATA_VARIABLE, MIRROR_VARIABLE, Recipe, RecipeError, derive_batch
from crate_dist.errors import UserError
from crate_dist.job import TrainJob
from crate_dist.launching.cluster import add_cluster_options, asked_again, check_cluster
from crate_dist.launching.grid import Grid, add_grid_options, is_swept, read_grid, recipes_of, run_dirs_of, save_grid
from crate_dist.launching.memory import advice
from crate_dist.launching.opening import opened
from crate_dist.launching.options import recipe_parser, site_from
from crate_dist.launching.origins import DEFAULT, Settled, as_table, origin_of, settle
from crate_dist.launching.preflight import Preflight, folder_of_weights
from crate_dist.launching.showing import show, summary
from crate_dist.launching.site import PrintTemplate, Site
from crate_dist.launching.sweep import look_at_all, nothing_to_do, plan, runs_table
from crate_dist.locations import is_private
from crate_dist.run.dashboard import how_to_watch
from crate_dist.run.snapshot import Snapshot, prune
from crate_dist.slurm.executor import Executor, environment_for, make_executor
from crate_dist.slurm.nodes import dividing_nodes, nodes_used, said_of_nodes, world_sizes
from crate_dist.slurm.options import CONTROL, given_here, outvoted
from crate_dist.slurm.queue import largest_array
from crate_dist.slurm.verdict import Verdict, as_sentence, ask, beyond_partition, qos_beyond, refusal
from crate_dist.terminal import complain, labelled
from crate_dist.watching.notify import add_options


def main(argv: list[str] | None = None) -> int:
    """Checks, submits, says how to watch; returns the exit status."""
    arguments = (parser := _parser()).parse_args(argv)
    if not (arguments.arch or arguments.config or arguments.grid_file):
        parser.error("one of the arguments --arch --config --grid-file is required")
    try:
        site = site_from(arguments)
        grid = read_grid(arguments)
        every = _jobs(arguments, grid, site)
        recipes = [job.recipe for job in every]
        runs = plan(grid, recipes, run_dirs_of(arguments, grid, recipes, site), arguments.start_over)
        jobs = [job for job, run in zip(every, runs, strict=True) if not run.idle]
        if not jobs:
            show(nothing_to_do(grid, runs))
            return 0
        recipes, run_dirs = [job.recipe for job in jobs], [run.run_dir for run in runs if not run.idle]
        weights = [folder_of_weights(recipe.train.init_from) for recipe in recipes if recipe.train.init_from]
        home, snapshot = _home(run_dirs), Snapshot.take()
        code = home / "code" / snapshot.digest
        executor = make_executor(recipes[0], home / "slurm" / "%j", run_dirs, code, weights, jobs[0].options)
        if arguments.max_parallel:
            executor.update_parameters(array_parallelism=arguments.max_parallel)
        found, problems = look_at_all(recipes, run_dirs, arguments.start_over, arguments.accept_changed_data)
        verdict = _ask(executor, len(jobs), arguments)
        waits_for_now = verdict.answer == "not now" and not arguments.dry_run and not arguments.test_only
        more, note = _said_by_slurm(executor, jobs, verdict, waits_for_now)
        problems = _paragraphs([*problems, *more], recipes[0])
        if note:
            show(labelled("note", note))
        if arguments.dry_run or arguments.test_only:
            _show_verdict(verdict, problems)
        shown = ""
        if arguments.dry_run:
            _show_values(arguments, grid, site, executor, jobs, run_dirs)
            for job, run in zip(jobs[:1], found, strict=False):
                shown = summary(job.recipe, run)
                show(f"\n{shown}")
        if arguments.gpu_memory_gb:
            world_size, _ = world_sizes(recipes[0])
            train = recipes[0].train
            micro_batch, _ = derive_batch(train.global_batch, world_size, train.micro_batch, train.group)
            if (said := advice(recipes[0], micro_batch, world_size, arguments.gpu_memory_gb)) not in shown:
                show(said)
        if arguments.dry_run:
            _show_script(executor, recipes)
        if len(recipes[0].cluster.node_counts) > 1:
            show(labelled("nodes", said_of_nodes(recipes[0])))
        if problems:
            raise RecipeError("\n\nerror: ".join(problems))
        states = {run.folder.path: "goes on" if run.resumes else "new" for run in found}
        if not arguments.dry_run and not arguments.test_only:
            root = (site.runs or Path("runs")).absolute()
            states |= _submit(executor, jobs, found, snapshot, home / "code", arguments, root)
            if is_swept(arguments):
                save_grid(run_dirs[0].parent, grid, every[0].recipe)
            if verdict.start or waits_for_now:
                now = verdict.start or f"not as things stand, by SLURM: {as_sentence(verdict.said)}; the job waits"
                show(labelled("starts", now))
        if grid:
            show(runs_table(grid, runs, states))
    except (UserError, OSError) as error:
        complain(error)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = recipe_parser(__doc__, required=False)
    parser.elsewhere = given_here
    add_cluster_options(parser)
    add_options(parser, mail=True)
    add_grid_options(parser).add_argument(
        "--max-parallel", type=positive, metavar="N", help="runs of the array that may be under way at a time [256]"
    )
    parser.add_argument(
        "--gpu-memory-gb", type=float, metavar="GB", help="say what the micro-batch needs of such a card, and what fits"
    )
    instead = parser.add_argument_group("instead of submitting")
    instead.add_argument(
        "--dry-run",
        action="store_true",
        help="say whether it would start, where each value comes from, what it needs; show script and recipe",
    )
    instead.add_argument(
        "--test-only", action="store_true", help="say whether SLURM would take it, and when it would start it"
    )
    instead.add_argument("--site-template", action=PrintTemplate, nargs=0, help="print a site file to begin with")
    return parser


def _jobs(arguments: argparse.Namespace, grid: Grid, site: Site) -> list[Settled]:
    """Settles what each run's job asks for: the recipe's [cluster] table, then the site's values, then the flags."""
    jobs = [settle(recipe, arguments, site) for recipe in recipes_of(arguments, grid, site)]
    check_cluster(jobs[0].recipe.cluster)
    of_a_range = [job.recipe for job in jobs if len(job.recipe.cluster.node_counts) > 1]
    if any(nodes_used(recipe) != nodes_used(of_a_range[0]) for recipe in of_a_range[1:]):
        raise RecipeError(
            "the runs of this grid have global batches that divide over different numbers of nodes, and an array has "
            "one shape: give --nodes one number, or start such runs one by one"
        )
    return jobs


def _home(run_dirs: Sequence[Path]) -> Path:
    """Returns where submitit's files and the code lie: in the run folder, those of an array beside its run folders.

    Raises RecipeError for a path that submitit would misread, or that would not stay on its line of the script.
    """
    folder = run_dirs[0] if len(run_dirs) == 1 else run_dirs[0].parent
    if any(CONTROL.search(str(run_dir)) for run_dir in run_dirs):
        raise RecipeError(f"--run-dir: {str(run_dirs[0])!r} has a control character in it; give another one")
    misread = re.search(r"%[jtAa]|\\", str(folder))
    if misread:
        raise RecipeError(
            f"submitit and SLURM would read the {misread[0]} in {folder} as a pattern; give another --run-dir"
        )
    return folder


def _ask(executor: Executor, jobs: int, arguments: argparse.Namespace) -> Verdict:
    """Asks SLURM what it would say. Raises RecipeError where its answer is needed and there is no sbatch."""
    if not arguments.dry_run and not shutil.which("sbatch"):
        raise RecipeError(
            "no sbatch on this machine: run this on a login node of the cluster, or `module load slurm` there; "
            "launch/local.py trains on this machine, and --dry-run shows what would be submitted"
        )
    script = executor.script(jobs)
    verdict = ask(script, environment_for(script))
    if arguments.test_only and verdict.answer == "unknown":
        raise RecipeError(verdict.said)
    return verdict


def _said_by_slurm(
    executor: Executor, jobs: Sequence[Settled], verdict: Verdict, waits_for_now: bool
) -> tuple[list[str], str]:
    """Returns what is wrong with the job by SLURM's answer and its partitions' limits, and a note; "": none."""
    settings = jobs[0].settings
    beyond = beyond_partition(jobs[0].recipe.cluster, settings)
    may_be_more = qos_beyond(settings) if beyond else ""
    note = f"{beyond}; {may_be_more}" if may_be_more else ""
    if beyond and not note:
        return [f"{beyond}: the job would wait for ever"], ""
    if verdict.answer == "no" or (verdict.answer == "not now" and not waits_for_now):
        return [refusal(verdict.said, settings, environment_for(executor.script(len(jobs))))], note
    return [], note


def _paragraphs(problems: Sequence[str], recipe: Recipe) -> list[str]:
    """Returns problems one by one, that of the batch with the numbers of nodes that would do."""
    said = [paragraph for problem in problems for paragraph in problem.split("\n\n")]
    nodes = dividing_nodes(recipe)
    return [f"{text}; {nodes}" if nodes and "does not divide over" in text else text for text in said]


def _show_verdict(verdict: Verdict, problems: Sequence[str]) -> None:
    if problems:
        said = f"NO: it would not start; {len(problems)} thing(s) are wrong, named here and at the end"
        said = "\n".join([said, *(f"  {line}" for problem in problems for line in problem.splitlines())])
    elif verdict.answer == "yes":
        said = f"yes: SLURM would take it{f', and start it at {verdict.start}' if verdict.start else ''}"
    else:
        said = f"nothing is wrong as far as can be told here: {verdict.said}"
    show(labelled("verdict", said))


def _show_values(
    arguments: argparse.Namespace,
    grid: Grid,
    site: Site,
    executor: Executor,
    jobs: Sequence[Settled],
    run_dirs: Sequence[Path],
) -> None:
    """Shows every value with its origin."""
    run_dir = str(run_dirs[0]), "--run-dir" if arguments.run_dir else site.origins.get("runs", DEFAULT)
    swept = {key: (", ".join(map(str, values)), "the grid, below") for key, values in grid.items()}
    values = {**origin_of(jobs[0].recipe, arguments, site), **swept, "run folder": run_dir, **jobs[0].settings}
    show("\n" + labelled("value", "and where it is from: recipe < site < flags; all else has its default, as below\n"))
    show(as_table(values))
    for name in outvoted(executor.script(len(jobs)), os.environ):
        show(f"  ${name} is left out, for the script below says otherwise")


def _show_script(executor: Executor, recipes: Sequence[Recipe]) -> None:
    show(executor.script(len(recipes)), verbatim=True)
    show(f"# {'-' * 20} recipe.toml{' of the first run' if len(recipes) > 1 else ''} {'-' * 20}")
    show(recipes[0].to_toml(), verbatim=True)


def _submit(
    executor: Executor,
    jobs: Sequence[Settled],
    found: Sequence[Preflight],
    snapshot: Snapshot,
    code: Path,
    arguments: argparse.Namespace,
    root: Path,
) -> dict[Path, str]:
    """Opens the run folders, submits, says how to watch; returns what there is to say of each run.

    root: the folder in which there are runs of other commands too
    """
    recipes = [job.recipe for job in jobs]
    _check_environment_goes_along(recipes[0])
    if len(found) > 1 and (most := largest_array()) and len(found) > most:
        raise RecipeError(
            f"{len(found):,} runs are more than an array of this cluster may have: MaxArraySize is {most}"
        )
    with ExitStack() as locks:
        for recipe, run in zip(recipes, found, strict=True):
            locks.enter_context(opened(run.folder, recipe, arguments.start_over, brief=True, lost=lambda why: None))
            run.folder.record.note_asked(asked_again(arguments))
        snapshot.write(code)
        if len(found) == 1:  # another array's jobs may wait for what lies beside this one's runs
            prune(code, {*found[0].folder.record.snapshots(), snapshot.digest})
        sent = executor.send([TrainJob(run.folder.path, run.accepted_data) for run in found], jobs[0].settings)
        for job, run in zip(sent, found, strict=True):
            if len(sent) > 1:
                run.folder.slurm.mkdir(exist_ok=True)
                (link := run.folder.slurm / job.job_id).unlink(missing_ok=True)  # a cluster that was set up anew
                link.symlink_to(os.path.relpath(job.paths.folder, run.folder.slurm))
    job_id, folder = sent[0].job_id.partition("_")[0], found[0].folder.path
    texts = [str(run).splitlines() for run in found]
    in_common = [line for line in texts[0] if all(line in text for text in texts)]
    show("\n".join([labelled("job", job_id), *in_common]))
    array = job_id if folder.parent == root else folder.parent  # there are other runs beside it
    runs = shlex.quote(str(folder if len(found) == 1 else array))
    show(labelled("to watch", f"python launch/status.py {runs} --watch"))
    show(labelled("", f"squeue --job {job_id}"))
    show(labelled("", f"tail -F {shlex.quote(str(sent[0].paths.stdout))}"))
    for line in how_to_watch(found[0].folder):
        show(labelled("", line))
    show(labelled("to stop", f"python launch/status.py stop {runs}"))
    show(labelled("to cancel", f"scancel {job_id}"))
    return {run.folder.path: f"job {job.job_id}" for job, run in zip(sent, found, strict=True)}


def _check_environment_goes_along(recipe: Recipe) -> None:
    """Raises RecipeError when a location that recipe.toml does not keep would be out of the job's sight."""
    exported = os.environ.get("SBATCH_EXPORT", "ALL").split(",")
    mirror = recipe.checkpoint.find_mirror()
    for name, what, place in (
        (DATA_VARIABLE, "data", recipe.data.find_root()),
        (MIRROR_VARIABLE, "mirror", mirror or ""),
    ):
        if place and is_private(place) and not {"ALL", name} & set(exported):
            raise RecipeError(
                f"SBATCH_EXPORT={os.environ['SBATCH_EXPORT']} keeps {name} from the job, in which the location of "
                f"the {what} travels: unset SBATCH_EXPORT, or put {name} among its names"
            )


if __name__ == "__main__":
    sys.exit(main())
