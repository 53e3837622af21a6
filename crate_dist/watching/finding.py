"""Which runs are meant: by path, by name, by SLURM job, or all of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from crate_dist.errors import UserError
from crate_dist.launching.site import load_site
from crate_dist.run.folder import RunFolder


def runs_root() -> Path:
    """Returns the folder of runs that are not named by their path: the site's, or runs. Raises RecipeError."""
    return load_site().runs or Path("runs")


def find_runs(words: Sequence[str], root: Path | None = None) -> list[Path]:
    """Returns the run folders that words name: paths of runs or of folders with runs in them (an array), names below
    `root`, numbers of SLURM jobs. No words: all below `root`.

    root: None: runs_root(), which is asked for where a word is no path
    Raises UserError: a word that names nothing.
    """
    found: dict[Path, None] = {}
    known: list[Path] | None = None
    for word in words or [""]:
        runs = list(_runs_in(Path(word).expanduser())) if word else []
        if not runs:
            root = root or runs_root()
            known = list(_runs_in(root)) if known is None else known
            runs = (list(_runs_in(root / word)) if word else known) or _of_job(word, known)
        if not runs:
            assert root
            assert known is not None
            raise UserError(_unknown(word, root, known))
        found |= dict.fromkeys(runs)
    return [run.absolute() for run in found]


def _of_job(word: str, runs: Sequence[Path]) -> list[Path]:
    """Returns the runs of a SLURM job; of an array's number, those of its tasks."""
    jobs = {run: RunFolder(run).jobs() for run in runs}
    return [run for run in runs if word in jobs[run]] or [
        run for run in runs if any(job.partition("_")[0] == word for job in jobs[run])
    ]


def _unknown(word: str, root: Path, known: Sequence[Path]) -> str:
    if not word:
        return f"no run in {root.absolute()}: name the folder of one, or begin one with launch/local.py"
    names = ", ".join(str(run.relative_to(root)) for run in known[:5]) + (", …" if len(known) > 5 else "")
    return (
        f"{word}: no run folder, nor a folder with runs in it, nor one below {root}, nor a SLURM job of a run there"
        + (f"; runs there are {names}" if known else "; give the folder that --run-dir named")
    )


def _runs_in(folder: Path, depth: int = 2) -> Iterator[Path]:
    """Yields the run itself, or the runs below a folder, without those that --start-over has set aside.

    A folder that cannot be read is passed over, with a note.
    """
    try:
        is_run = RunFolder(folder).recipe_file.is_file()
        names = sorted(os.listdir(folder)) if depth and not is_run and folder.is_dir() else []
    except PermissionError as error:
        print(f"note: {error.filename} is passed over: it cannot be read", file=sys.stderr)  # noqa: T201
        return
    if is_run:
        yield folder
    else:
        for name in names:
            if ".before-" not in name and name[0] != ".":
                yield from _runs_in(folder / name, depth - 1)
