"""Which runs are meant: by path, by name, by SLURM job, or all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from crate_dist.errors import UserError
from crate_dist.run.folder import RunFolder


def runs_root() -> Path:
    """Returns the folder in which runs are looked for that are not named by their path."""
    return Path("runs")


def find_runs(words: Sequence[str], root: Path | None = None) -> list[Path]:
    """Returns the run folders that words name: paths of runs or of folders with runs in them (an array), names below
    `root`, numbers of SLURM jobs. No words: all below `root`.

    Raises UserError: a word that names nothing.
    """
    root = root or runs_root()
    known = list(_runs_in(root))
    if not words and not known:
        raise UserError(f"no run in {root.absolute()}: name the folder of one, or begin one with launch/local.py")
    found = dict.fromkeys([] if words else known)
    for word in words:
        runs = list(_runs_in(Path(word).expanduser())) or list(_runs_in(root / word))
        runs = runs or [run for run in known if word in RunFolder(run).jobs()]
        runs = runs or [run for run in known if any(_array(job) == word for job in RunFolder(run).jobs())]
        if not runs:
            names = ", ".join(str(run.relative_to(root)) for run in known[:5]) + (", …" if len(known) > 5 else "")
            raise UserError(
                f"{word}: no run folder, nor a folder with runs in it, nor one below {root}, nor a SLURM job of a run "
                f"there" + (f"; runs there are {names}" if known else "")
            )
        found |= dict.fromkeys(runs)
    return [run.absolute() for run in found]


def _array(job: str) -> str:
    return job.partition("_")[0]


def _runs_in(folder: Path, depth: int = 2) -> Iterator[Path]:
    """Yields the run itself, or the runs below a folder, without those that --start-over has set aside."""
    if RunFolder(folder).recipe_file.is_file():
        yield folder
    elif depth and folder.is_dir():
        for name in sorted(os.listdir(folder)):
            if ".before-" not in name and name[0] != ".":
                yield from _runs_in(folder / name, depth - 1)
