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
from crate_dist.launching.opening import opened
from crate_dist.launching.options import default_run_dir, recipe_from, recipe_parser, site_from
from crate_dist.launching.preflight import preflight
from crate_dist.launching.ranks import RankFailed, rank_environment, run_ranks, visible_gpus
from crate_dist.run.exit_status import STOPPED
from crate_dist.run.folder import RunFolder
from crate_dist.run.snapshot import START, Snapshot, prune
from crate_dist.watching.notify import add_options, tell, watched
from crate_dist.world import free_port


def main(argv: list[str] | None = None) -> int:
    """Checks, starts the ranks, waits for them; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        site = site_from(arguments)
        recipe, notify = recipe_from(arguments, site), arguments.notify or site.notify
        run_dir = (arguments.run_dir or default_run_dir(recipe, site)).expanduser().absolute()
        ranks = _ranks(arguments.ranks)
        snapshot, code = Snapshot.take(), RunFolder(run_dir).code
        command = _command(code / snapshot.digest, run_dir, arguments.accept_changed_data)
        if arguments.dry_run:
            _show(recipe, ranks, command)
        found = preflight(recipe, ranks, run_dir, arguments.start_over, arguments.accept_changed_data)
        print(found, flush=True)
        if arguments.dry_run:
            return 0
        with opened(found.folder, recipe, arguments.start_over, lost=lambda why: None) as lock:  # the ranks take it
            snapshot.write(code)
            prune(code, {*found.folder.record.snapshots(), snapshot.digest})
            print(f"{'to watch':<14}tensorboard --logdir {shlex.quote(str(run_dir.parent))}")
            print(f"{'':<14}python launch/status.py {shlex.quote(str(run_dir))}", flush=True)
            with watched(notify, run_dir, arguments.stuck_after):
                run_ranks(command, ranks, found.folder, lock.environment())
    except (UserError, OSError) as error:
        if isinstance(error, RankFailed) and error.exit_status == STOPPED:
            print("stopped, as it was asked to; the same command goes on from the newest checkpoint", file=sys.stderr)
            return STOPPED
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, RankFailed) and notify:
            print(tell(notify, run_dir, "failed", str(error)), file=sys.stderr)
        return error.exit_status if isinstance(error, RankFailed) else 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130
    if notify:
        print(tell(notify, run_dir, "done"), file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = recipe_parser(__doc__)
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


def _command(code: Path, run_dir: Path, accept_changed_data: bool) -> list[str]:
    command = [sys.executable, "-u", str(code / START), "-m", "crate_dist.train", "--run-dir", str(run_dir)]
    return command + (["--accept-changed-data"] if accept_changed_data else [])


def _show(recipe: Recipe, ranks: int, command: list[str]) -> None:
    port = free_port()
    for rank in range(ranks):
        variables = " ".join(f"{key}={value}" for key, value in rank_environment(rank, ranks, port).items())
        print(f"{variables} {shlex.join(command)}")
    print(f"\n# recipe.toml\n{recipe.to_toml()}")


if __name__ == "__main__":
    sys.exit(main())
