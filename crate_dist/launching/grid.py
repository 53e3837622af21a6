"""A sweep: one recipe with a grid of values, a run folder for each combination. Imports no torch.

SWEEP/
    grid.toml            the grid as it was last submitted: --grid-file SWEEP/grid.toml goes on with all of its runs
    base.toml            the recipe around it
    lr=0.0001,seed=0/    a run folder, called by its values of the grid
    slurm/ code/         what the jobs of an array share
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import tomli_w

from crate_dist.arguments import whole_number
from crate_dist.config import Recipe, RecipeError
from crate_dist.config.keys import RENAMED, assign, flatten, keys_of, parse_value, renamed
from crate_dist.config.recipe import BASE_FILE, GRID_FILE
from crate_dist.config.rules import unread, with_defaults
from crate_dist.files import write_whole
from crate_dist.launching.options import default_run_dir, recipe_from
from crate_dist.launching.site import NO_SITE, Site
from crate_dist.locations import is_private, location, redacted
from crate_dist.run.folder import RunFolder

Grid = Mapping[str, Sequence[Any]]
"""Key of the recipe -> its values."""

_MANY = 100
_LONGEST_NAME, _LONGEST_WORD = 150, 40
_KNOWN = keys_of(Recipe)
_SHARED = {
    "name": "the runs of a grid are called by their values",
    "data.root": "the runs of a grid share their data",
    "cluster": "an array has one shape: all of its runs get the same nodes, time and partition",
}


def add_grid_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the options that make several runs of one command; returns their group."""
    group = parser.add_argument_group("several runs at once", "a run folder each; the same command goes on with all")
    group.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE,…",
        help="a run for each value, of several --grid for each combination, in RUNS/NAME-grid/lr=0.0001,seed=0 and so "
        "on. Values are those of a TOML list, without its brackets: 1e-4,2e-4 or '[0.08,1.0],[0.2,1.0]' or "
        """'"a,b","c"'; words need no quotes where none has any: lion,adamw""",
    )
    group.add_argument(
        "--grid-file",
        type=Path,
        metavar="FILE",
        help="the same as a [grid] table, optim.lr = [1e-4, 2e-4] and so on, with recipe = NAME or FILE before it, for "
        "want of --arch; a sweep leaves one in its folder, which may be named for it",
    )
    group.add_argument("--seeds", type=_seed, nargs="+", metavar="N", help="as --grid train.seed=N,… does")
    group.add_argument("--yes", action="store_true", help=f"also more than {_MANY} runs")
    return group


def _seed(text: str) -> int:
    if re.fullmatch(r"\d+(,\d+)+", text):
        raise argparse.ArgumentTypeError(f"{text!r}: seeds stand apart, as in --seeds {text.replace(',', ' ')}")
    return whole_number(0)(text)


def read_grid(arguments: argparse.Namespace) -> Grid:
    """Returns the grid that the options ask for, its keys in order; an empty one for a single run.

    What a grid file says of the recipe and its folder is put into `arguments`, where they are open.

    Raises RecipeError: a wrong key or list of values, one that is given twice, too many runs, no recipe.
    """
    given = {"train.seed": "--seed"} if arguments.seed is not None else {}
    for text in arguments.overrides:
        key = text.partition("=")[0].strip()
        given[RENAMED.get(key, key)] = f"--set {text}"
    grid: dict[str, Sequence[Any]] = {}
    for origin, key, values in [*_of_file(arguments), *map(_parsed, arguments.grid), *_of_seeds(arguments)]:
        assign({}, key, None, _KNOWN, origin)
        old, key = key, RENAMED.get(key, key)
        if shared := next((why for name, why in _SHARED.items() if f"{key}.".startswith(f"{name}.")), None):
            raise RecipeError(f"{origin}: {key} cannot be in a grid: {shared}; start such runs one by one")
        if not isinstance(values, list) or not values:
            raise RecipeError(f"{origin}: {key} = {values!r} is no list of values; {key} = [VALUE, VALUE] would be")
        if place := next((text for text in map(str, values) if is_private(location(text))), None):
            raise RecipeError(
                f"{origin}: {redacted(place)} cannot be in a grid, for that is written to files, and this has a secret "
                "in it or is a command; start such runs one by one"
            )
        if key in given:
            raise RecipeError(f"{given[key]} and {origin}: give one of them")
        given[key], grid[key] = origin, [renamed(old, value)[1] for value in values]
    if not (arguments.arch or arguments.config):
        raise RecipeError(f'{arguments.grid_file} names no recipe: --arch NAME does, or recipe = "NAME" in it')
    count = math.prod(map(len, grid.values()))
    if count > _MANY and not arguments.yes:
        shape = " x ".join(str(len(values)) for values in grid.values())
        raise RecipeError(f"the grid of {shape} values makes {count:,} runs; --yes, if so many are meant")
    return dict(sorted(grid.items()))


def recipes_of(arguments: argparse.Namespace, grid: Grid, site: Site = NO_SITE) -> list[Recipe]:
    """Loads the recipe of each combination of values, the last key's changing fastest.

    A setting of parts may be given that only some of the runs read: the others are the same for all of its values.

    Raises RecipeError: as load_recipe does, no run reads what is given, or two of them are the same.
    """
    may_be_unread = set[str]()
    if any(key.startswith("model.") for key in grid):
        every = {key for key in _KNOWN if key.startswith("model.")}
        nothing = (unread(recipe.model.parts()) for recipe in _each(arguments, grid, site, every))
        may_be_unread = every - {f"model.{name}" for name in set.intersection(*nothing)}
    if arguments.grid_file and arguments.config and arguments.config.name == BASE_FILE:
        may_be_unread |= grid.keys()  # of a sweep from when nobody was told
    recipes = list(_each(arguments, grid, site, may_be_unread))
    name, times = Counter(run_name(recipe, grid) for recipe in recipes).most_common(1)[0]
    if times > 1:
        raise RecipeError(f"{name} is in the grid {times} times: a value is given twice, as 1e-4 and 0.0001 would be")
    return recipes


def _each(arguments: argparse.Namespace, grid: Grid, site: Site, may_be_unread: Collection[str]) -> Iterator[Recipe]:
    """Loads the recipe of each combination of values. Raises RecipeError, which calls those of the grid so."""
    for values in itertools.product(*grid.values()):
        one, settings = copy(arguments), [f"{key}={_toml(value)}" for key, value in zip(grid, values, strict=True)]
        one.overrides = [*arguments.overrides, *settings]
        try:
            yield recipe_from(one, site, may_be_unread)
        except RecipeError as error:
            said = str(error)
            for setting in settings:
                said = said.replace(f"--set {setting}", f"--grid {setting}")
            raise RecipeError(said) from error


def run_name(recipe: Recipe, keys: Collection[str]) -> str:
    """Returns what a run is called by its values: the same for the same values, and the name of a folder anywhere."""
    values, last = flatten(recipe.model_dump(mode="json")), Counter(key.rpartition(".")[2] for key in keys)
    words = []
    for key in keys:
        short = key.rpartition(".")[2]
        words.append(f"{short if last[short] == 1 else key}={_written(values[key])}")
    name = ",".join(words)
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}~{_mark(name)}"


def run_dirs_of(
    arguments: argparse.Namespace, grid: Grid, recipes: Sequence[Recipe], site: Site = NO_SITE
) -> list[Path]:
    """Returns the folder of each run, absolute. Runs that differ in --seeds alone are called as they always were.

    Raises RecipeError: the folder of the sweep is that of a run, or of another sweep.
    """
    given: Path | None = arguments.run_dir
    if not grid:
        run_dirs = [given or default_run_dir(recipes[0], site)]
    elif not is_swept(arguments):
        run_dirs = [given / f"seed{r.train.seed}" if given else default_run_dir(r, site) for r in recipes]
    else:
        sweep = given or (site.runs or Path("runs")) / f"{recipes[0].name}-grid"
        if RunFolder(sweep).recipe_file.exists():
            raise RecipeError(f"{sweep} is the folder of a single run; give the sweep another one by --run-dir")
        if (there := sweep / GRID_FILE).exists() and (keys := flatten(_read(there)[1])).keys() != grid.keys():
            raise RecipeError(
                f"{sweep} holds a sweep over {' and '.join(sorted(keys))}; give this one, over {' and '.join(grid)}, "
                "another folder by --run-dir"
            )
        run_dirs = [sweep / run_name(recipe, grid) for recipe in recipes]
    return [run_dir.expanduser().absolute() for run_dir in run_dirs]


def is_swept(arguments: argparse.Namespace) -> bool:
    """Tells whether the runs have a folder together, which is theirs alone; those of --seeds need not have."""
    return bool(arguments.grid or arguments.grid_file)


def save_grid(sweep: Path, grid: Grid, base: Recipe) -> None:
    """Writes the files by which --grid-file goes on with the sweep. base: the recipe of any of its runs"""
    sweep.mkdir(parents=True, exist_ok=True)
    model, usual = base.model, with_defaults(base.model.parts(), {})  # which the parts of other runs may not have
    options = {name: value for name, value in model.options.items() if value != usual[name]}
    base = base.model_copy(update={"model": model.model_copy(update={"options": options})})
    write_whole(sweep / BASE_FILE, base.to_toml())
    lines = [
        "# --grid-file with this file goes on with all of the runs beside it.",
        f'recipe = "{BASE_FILE}"',
        "",
        "[grid]",
        *(f"{key} = [{', '.join(map(_toml, values))}]" for key, values in grid.items()),
    ]
    write_whole(sweep / GRID_FILE, "\n".join(lines) + "\n")


def _parsed(text: str) -> tuple[str, str, list[Any]]:
    """Reads KEY=VALUES of the command line."""
    key, equals, values = (part.strip() for part in text.partition("="))
    if not equals or not values:
        raise RecipeError(f"--grid {text}: expected section.key=value,value, for instance --grid optim.lr=1e-4,2e-4")
    try:
        return f"--grid {key}", key, tomllib.loads(f"values = [{values}]")["values"]
    except tomllib.TOMLDecodeError as error:
        if re.search("[\"'\\[\\]{}]", values):
            raise RecipeError(
                f"--grid {text}: {values} are no values of a TOML list ({error}); with a list or a quoted word among "
                """them all words need quotes, and the shell needs others: --grid 'data.train_split="a,b","c"'"""
            ) from None
        return f"--grid {key}", key, [parse_value(value.strip()) for value in values.split(",")]


def _of_file(arguments: argparse.Namespace) -> Iterator[tuple[str, str, Any]]:
    """Reads --grid-file; sets the recipe and the run folder, where nothing else does."""
    if not arguments.grid_file:
        return
    path = arguments.grid_file.expanduser().absolute()
    path = path / GRID_FILE if path.is_dir() else path
    recipe, grid = _read(path)
    if recipe and not (arguments.arch or arguments.config):
        arguments.config, arguments.arch = (path.parent / recipe, None) if recipe.endswith(".toml") else (None, recipe)
    if path.name == GRID_FILE and not arguments.run_dir and (path.parent / BASE_FILE).exists():
        arguments.run_dir = path.parent
    for key, values in flatten(grid).items():
        yield str(path), key, values


def _read(path: Path) -> tuple[str | None, dict[str, Any]]:
    """Returns the recipe and the table of a grid file."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"cannot read the grid file {path}: {error.strerror}; --grid-file takes a file, or the folder of a sweep"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not TOML: {error}") from error
    recipe, grid = raw.pop("recipe", None), raw.pop("grid", None)
    if raw or not isinstance(grid, dict) or not isinstance(recipe, str | None):
        raise RecipeError(
            f"{path}: a grid file has a table [grid], and before it may have recipe = NAME or FILE"
            + (f"; it has {', '.join(raw)} too" if raw else "")
        )
    return recipe, grid


def _of_seeds(arguments: argparse.Namespace) -> Iterator[tuple[str, str, Any]]:
    seeds = arguments.seeds or []
    if len(set(seeds)) < len(seeds):
        raise RecipeError(f"--seeds {' '.join(map(str, seeds))}: the same seed twice would be the same run twice")
    if seeds:
        yield "--seeds", "train.seed", list(seeds)


def _toml(value: Any) -> str:
    text = tomli_w.dumps({"value": value}).partition("=")[2]
    return " ".join(text.split()) if isinstance(value, list) else text.strip()


def _written(value: Any) -> str:
    """Writes a value so that it can stand in the name of a folder: what cannot is replaced, and a digest tells it."""
    parts, unsafe = (value, "[^A-Za-z0-9.+-]") if isinstance(value, list) else ([value], "[^A-Za-z0-9_.+-]")
    words = [part if isinstance(part, str) else json.dumps(part) for part in parts]
    safe = [re.sub(unsafe, "-", word)[:_LONGEST_WORD] for word in words]
    return "_".join(safe) + ("" if safe == words and all(words) else f"~{_mark(json.dumps(value))}")


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
