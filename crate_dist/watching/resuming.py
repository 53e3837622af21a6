"""Starts runs again, as they were started before, through the launcher that did it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import crate_dist
from crate_dist.errors import UserError
from crate_dist.launching.cluster import repeated
from crate_dist.run.folder import RunFolder
from crate_dist.watching.runs import Queue, look

LAUNCH = Path(crate_dist.__file__).resolve().parents[1] / "launch"


def resume(paths: Sequence[Path], options: Sequence[str]) -> int:
    """Starts runs that are over again by their own recipes; returns the exit status of the first that fails.

    options: of launch/slurm.py or launch/local.py, beside those that name the run
    Raises UserError: one of them is not over, or no launcher of ours started it.
    """
    queue = Queue.asked()
    runs = [look(path, queue, disk=False) for path in paths]
    for run in runs:
        if run.job or run.where:  # what cannot be seen from here, the launcher looks for itself
            raise UserError(
                f"{run.run} is {run.state}{f' ({run.why})' if run.why else ''}: stop it before, by "
                f"`launch/status.py stop {run.run} --wait`"
            )
    for run in runs:
        if run.state == "done":
            print(f"{run.run}: nothing to go on with: {run.why}")  # noqa: T201
            continue
        command = [sys.executable, *launch_command(run.run, options), *options]
        _say_what_is_missing(run.run, options)
        if status := subprocess.run(command).returncode:
            return status
    return 0


def launch_command(path: Path, options: Sequence[str] = ()) -> list[str]:
    """Returns the program, and the options, that start a run again with the resources that it had.

    options: those given now, which win
    Raises UserError: it was started by a plain srun, or its record is damaged.
    """
    folder = RunFolder(path)
    try:
        starts = (
            json.loads(folder.record_file.read_text(encoding="utf-8"))["starts"] if folder.record_file.exists() else []
        )
        launcher, ranks = (starts[-1].get("launcher"), starts[-1].get("world_size", 1)) if starts else (None, 1)
        asked = folder.record.asked()
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(
            f"{folder.record_file} does not say how the run was started ({type(error).__name__}: {error}); go on with "
            f"it by the command that did, or `launch/slurm.py --config {folder.recipe_file} --run-dir {path}`"
        ) from error
    jobs, by_slurm = folder.jobs(), launcher == "slurm"
    if by_slurm and not jobs:
        raise UserError(f"{path} was started by srun: the same command, given again, goes on with it")
    same = ["--config", str(folder.recipe_file), "--run-dir", str(path)]
    if jobs and (by_slurm or not starts):
        again, missing = repeated(asked, options)
        if missing := [words for words in missing if not words.startswith(("--setup", "--container"))]:  # named below
            print(f"note: it was started with {' '.join(missing)}: give that again, if it is meant", file=sys.stderr)  # noqa: T201
        return [str(LAUNCH / "slurm.py"), *same, *again]
    return [str(LAUNCH / "local.py"), *same, "--ranks", str(ranks)]


def _say_what_is_missing(path: Path, options: Sequence[str]) -> None:
    """Names what a recipe in a run folder does not keep, so that it must be given again; see docs/security.md."""
    for line in RunFolder(path).recipe_file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not any(option in line for option in options if option.startswith("--")):
            print(f"note: {line.lstrip('# ')} Repeat it here, unless your site settings have it.", file=sys.stderr)  # noqa: T201
