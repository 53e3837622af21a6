"""The runs of a sweep: which are left to start, whether they can work, what has come of them. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crate_dist.checkpoint.format import newest_manifest
from crate_dist.config import Recipe, RecipeError
from crate_dist.config.keys import flatten
from crate_dist.data.splits import Splits, open_splits
from crate_dist.errors import UserError
from crate_dist.files import whole_lines
from crate_dist.launching.grid import Grid
from crate_dist.launching.preflight import Preflight, preflight
from crate_dist.run.checkpoints import judged_top1
from crate_dist.run.folder import RunFolder, read_recipe
from crate_dist.slurm.nodes import world_sizes
from crate_dist.slurm.queue import NoAnswer, QueuedJob, is_here, my_jobs
from crate_dist.wording import NONE, aligned


@dataclass(frozen=True)
class Planned:
    """A run that a command names. idle: why it needs no start; "": it does"""

    recipe: Recipe
    run_dir: Path
    idle: str = ""


def plan(grid: Grid, recipes: Sequence[Recipe], run_dirs: Sequence[Path], start_over: bool = False) -> list[Planned]:
    """Returns the runs of a command. Those that are complete are left alone, and of a sweep those under way.

    Raises RecipeError: SLURM does not say which are under way, or one that is to be left alone has another recipe.
    """
    runs = [Planned(recipe, run_dir) for recipe, run_dir in zip(recipes, run_dirs, strict=True)]
    if start_over:
        return runs
    try:
        queue = my_jobs() if grid and is_here() and any(RunFolder(run.run_dir).jobs() for run in runs) else []
    except NoAnswer as error:
        raise RecipeError(f"SLURM does not say which runs of the sweep are under way: {error}") from error
    return [Planned(run.recipe, run.run_dir, why_idle(run.recipe, RunFolder(run.run_dir), queue)) for run in runs]


def why_idle(recipe: Recipe, folder: RunFolder, queue: Sequence[QueuedJob] = ()) -> str:
    """Says why a run needs no start: it is complete, or one of the queue's jobs is its; "": it does need one.

    Raises RecipeError: it is the complete run of another recipe, or a job's that trains another.
    """
    jobs = folder.jobs() if queue else []
    for job in queue:
        if {job.number, job.name} & {*jobs}:
            folder.check(recipe, queued=job.name)
            return f"job {job.name} is {job.state.lower()}"
    try:
        manifest = newest_manifest(folder.checkpoints)
    except OSError:  # preflight says what is wrong there
        return ""
    data = manifest.data["train"] if manifest and manifest.data else None
    if not manifest or not data or not folder.model("last").exists():
        return ""
    if manifest.progress.step < recipe.train.last_step(recipe.order.repeats * data["samples"]):
        return ""
    folder.check(recipe)
    return f"complete at step {manifest.progress.step}"


def nothing_to_do(grid: Grid, runs: Sequence[Planned]) -> str:
    """Says that no run of a command needs a start, and why."""
    if grid:
        return f"{runs_table(grid, runs, {})}\nnothing is left to do"
    return (
        f"{runs[0].run_dir}: {runs[0].idle}, and nothing is left to do; longer training is a new run: "
        f"more train.epochs with another --run-dir, from these weights with --init-from {runs[0].run_dir}"
    )


def look_at_all(
    recipes: Sequence[Recipe],
    run_dirs: Sequence[Path],
    start_over: bool = False,
    accept_changed_data: bool = False,
    ranks: int | None = None,
) -> tuple[list[Preflight], list[str]]:
    """Looks at each run as `preflight` does; returns those in order, and what is wrong, with which of the others.

    The index of data that several runs share is read once. ranks: None: as many as the recipe's cluster has
    """
    found, problems, opened = [], dict[str, list[str]](), dict[object, Splits]()

    def open_once(recipe: Recipe) -> Splits:
        looked_at = recipe.data, recipe.train.global_batch, recipe.model.num_classes
        if looked_at not in opened:
            opened[looked_at] = open_splits(recipe)
        return opened[looked_at]

    for recipe, run_dir in zip(recipes, run_dirs, strict=True):
        try:
            how = start_over, accept_changed_data, open_once
            found.append(preflight(recipe, ranks or world_sizes(recipe)[1], run_dir, *how))
        except UserError as error:
            problems.setdefault(str(error), []).append(run_dir.name)
    if len(recipes) == 1:
        return found, list(problems)
    runs = [f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}" for names in problems.values()]
    return found, [f"{run}: {text}" for run, text in zip(runs, problems, strict=True)]


def runs_table(grid: Grid, runs: Sequence[Planned], states: Mapping[Path, str]) -> str:
    """Returns a line for each run: its folder, its values of the grid, and what there is to say of it.

    states: by run folder; of those that are left alone, it is why
    """
    values = [flatten(run.recipe.model_dump(mode="json")) for run in runs]
    rows = [
        [run.run_dir.name, *(_shown(its[key]) for key in grid), run.idle or states.get(run.run_dir, "")]
        for run, its in zip(runs, values, strict=True)
    ]
    return "\n".join(aligned([("run", *grid, ""), *rows]))


def results_table(run_dirs: Sequence[Path]) -> str:
    """Returns a line for each run, the best one first: top-1, loss and step so far, and the settings that differ.

    Raises RecipeError: a folder is no run's.
    """
    apart = settings_apart(run_dirs)
    rows: list[tuple[float, list[str]]] = []
    for number, run_dir in enumerate(run_dirs):
        newest: dict[str, float] = {}
        best = -1.0
        for line in _lines(RunFolder(run_dir)):
            newest |= line
            best = max(best, judged_top1(line))
        losses = [f"{newest[key]:.4f}" if key in newest else NONE for key in ("train/loss", "val/loss")]
        settings = [_shown(values[number]) for values in apart.values()]
        cells = [
            run_dir.name,
            f"{best:.2f}" if best >= 0 else NONE,
            *losses,
            str(newest.get("step", NONE)),
            *settings,
        ]
        rows.append((best, cells))
    rows.sort(key=lambda row: -row[0])
    head = ("run", "best top-1", "train loss", "val loss", "step", *apart)
    return "\n".join(aligned([head, *(cells for _, cells in rows)]))


def settings_apart(run_dirs: Sequence[Path]) -> dict[str, list[Any]]:
    """Returns the deciding settings in which runs differ, by key, a value for each run. Raises RecipeError."""
    found = [read_recipe(run_dir).deciding_values() for run_dir in run_dirs]
    keys = sorted(set().union(*found))
    apart = {key: [values.get(key) for values in found] for key in keys}
    return {key: values for key, values in apart.items() if any(value != values[0] for value in values)}


def _lines(folder: RunFolder) -> Iterator[dict[str, float]]:
    for text in whole_lines(folder.metrics):
        try:
            line = json.loads(text)
        except ValueError:  # a crash has cut it off
            continue
        if isinstance(line, dict):
            yield line


def _shown(value: Any) -> str:
    return NONE if value is None else value if isinstance(value, str) else json.dumps(value)
