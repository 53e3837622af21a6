"""Trains a recipe on this machine, without a scheduler: the same job as launch/slurm.py sends to a cluster.

    python launch/local.py --arch crate_tiny --data /data/imagenet-shards
    python launch/local.py --config my.toml --ranks 2

Run it again after whatever ended it: it goes on from the newest checkpoint of the run folder.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone's code, whichever else is installed
from crate_dist.arguments import positive
from crate_dist.config import Recipe, RecipeError
from crate_dist.errors import UserError
from crate_dist.launching.grid import add_grid_options, is_swept, read_grid, recipes_of, run_dirs_of, save_grid
from crate_dist.launching.opening import opened
from crate_dist.launching.options import recipe_parser, site_from
from crate_dist.launching.ranks import RankFailed, rank_environment, run_ranks, visible_gpus
from crate_dist.launching.showing import show
from crate_dist.launching.sweep import Planned, look_at_all, nothing_to_do, plan, runs_table, why_idle
from crate_dist.run.dashboard import how_to_watch
from crate_dist.run.exit_status import STOPPED
from crate_dist.run.folder import RunFolder
from crate_dist.run.snapshot import START, Snapshot, prune
from crate_dist.terminal import complain, labelled
from crate_dist.watching.notify import add_options, tell, watched
from crate_dist.world import free_port


def main(argv: list[str] | None = None) -> int:
    """Checks, starts the ranks, waits for them, of a grid one run after the other; returns the exit status."""
    arguments = (parser := _parser()).parse_args(argv)
    if not (arguments.arch or arguments.config or arguments.grid_file):
        parser.error("one of the arguments --arch --config --grid-file is required")
    try:
        site, grid = site_from(arguments), read_grid(arguments)
        arguments.notify = arguments.notify or site.notify
        recipes, ranks, snapshot = recipes_of(arguments, grid, site), _ranks(arguments.ranks), Snapshot.take()
        runs = plan(grid, recipes, run_dirs_of(arguments, grid, recipes, site), arguments.start_over)
        due = [run for run in runs if not run.idle]
        if not due:
            show(nothing_to_do(grid, runs))
            return 0
        if arguments.dry_run:
            _show(due[0].recipe, ranks, _command(snapshot, due[0].run_dir, arguments.accept_changed_data))
        recipes, run_dirs = [run.recipe for run in due], [run.run_dir for run in due]
        found, problems = look_at_all(recipes, run_dirs, arguments.start_over, arguments.accept_changed_data, ranks)
        if problems:
            raise RecipeError("\n\n".join(problems))
        if is_swept(arguments) and not arguments.dry_run:
            save_grid(due[0].run_dir.parent, grid, runs[0].recipe)
    except (UserError, OSError) as error:
        complain(error)
        return 1
    status = 0
    for run, preflight in zip(due, found, strict=True):
        show(str(preflight))
        if not arguments.dry_run and (status := _train(run, ranks, preflight.folder, snapshot, arguments)):
            break
    if grid:
        show(runs_table(grid, runs, {run.run_dir: why_idle(run.recipe, RunFolder(run.run_dir)) for run in due}))
    return status


def _train(run: Planned, ranks: int, folder: RunFolder, snapshot: Snapshot, arguments: argparse.Namespace) -> int:
    """Starts the ranks of one run and waits for them; returns the exit status."""
    command = _command(snapshot, run.run_dir, arguments.accept_changed_data)
    try:
        with opened(folder, run.recipe, arguments.start_over, lost=lambda why: None) as lock:  # the ranks take it
            snapshot.write(folder.code)
            prune(folder.code, {*folder.record.snapshots(), snapshot.digest})
            for label, line in zip(("to watch", ""), how_to_watch(folder), strict=True):
                show(labelled(label, line))
            show(labelled("", f"python launch/status.py {shlex.quote(str(folder.path))}"))
            with watched(arguments.notify, folder.path, arguments.stuck_after):
                run_ranks(command, ranks, folder, lock.environment())
    except (UserError, OSError) as error:
        if isinstance(error, RankFailed) and error.exit_status == STOPPED:
            print("stopped, as it was asked to; the same command goes on from the newest checkpoint", file=sys.stderr)
            return STOPPED
        complain(error)
        if isinstance(error, RankFailed) and arguments.notify:
            print(tell(arguments.notify, folder.path, "failed", str(error)), file=sys.stderr)
        return error.exit_status if isinstance(error, RankFailed) else 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130
    if arguments.notify:
        print(tell(arguments.notify, folder.path, "done"), file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = recipe_parser(__doc__, required=False)
    add_grid_options(parser)
    parser.add_argument("--ranks", type=positive, metavar="N", help="processes [one per GPU; without a GPU, one]")
    add_options(parser, mail=False)
    parser.add_argument("--dry-run", action="store_true", help="check, show what would run, and start nothing")
    return parser


def _ranks(asked: int | None) -> int:
    gpus = visible_gpus()
    ranks = max(gpus, 1) if asked is None else asked
    if 0 < gpus < ranks:
        raise RecipeError(
            f"--ranks {ranks}, but there are {gpus} GPU(s) and each rank needs its own; "
            f"give --ranks {gpus} or fewer, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    return ranks


def _command(snapshot: Snapshot, run_dir: Path, accept_changed_data: bool) -> list[str]:
    start = RunFolder(run_dir).code / snapshot.digest / START
    command = [sys.executable, "-u", str(start), "-m", "crate_dist.train", "--run-dir", str(run_dir)]
    return command + (["--accept-changed-data"] if accept_changed_data else [])


def _show(recipe: Recipe, ranks: int, command: list[str]) -> None:
    port = free_port()
    for rank in range(ranks):
        variables = " ".join(f"{key}={value}" for key, value in rank_environment(rank, ranks, port).items())
        show(f"{variables} {shlex.join(command)}", verbatim=True)
    show(f"\n# recipe.toml\n{recipe.to_toml()}", verbatim=True)


if __name__ == "__main__":
    sys.exit(main())
