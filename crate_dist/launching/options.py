"""Options that all ways to start a run share. Imports no torch."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from crate_dist.arguments import Parser, positive, whole_number
from crate_dist.config import DATA_VARIABLE, MIRROR_VARIABLE, Recipe, RecipeError, load_recipe, recipes
from crate_dist.config.settings import as_text, meanings
from crate_dist.launching.showing import show
from crate_dist.launching.site import NO_SITE, SITE_VARIABLE, Site, load_site
from crate_dist.locations import is_private, location


def recipe_parser(description: str | None, program: str | None = None, required: bool = True) -> Parser:
    """Returns a parser of the options that name a run and its recipe: --arch/--config, --data, --run-dir, --set, …

    required: one of --arch and --config must be given
    """
    parser = Parser(prog=program, description=description)
    parser.settings = meanings()
    known = recipes()
    width = max(map(len, known), default=0)
    listed = "\n".join(f"{name:<{width}}  {text}" for name, text in known.items())
    group = parser.add_argument_group("recipe", f"--arch takes one of these, which stand in configs/:\n\n{listed}")
    which = group.add_mutually_exclusive_group(required=required)
    which.add_argument("--arch", metavar="NAME", help="one of the recipes above, such as crate_large")
    which.add_argument("--config", metavar="FILE", type=Path, help="any recipe file")
    group.add_argument(
        "--data", metavar="DIR", type=location, help=f"folder or URL of the shards [recipe, then ${DATA_VARIABLE}]"
    )
    group.add_argument(
        "--run-dir", metavar="DIR", type=Path, help="folder of the run, resumed if it holds one [runs/RECIPE]"
    )
    group.add_argument(
        "--start-over", action="store_true", help="set aside what the run folder holds, and begin at step 0"
    )
    group.add_argument(
        "--init-from", metavar="PATH", type=Path, help="fine-tune: begin from a run, a checkpoint or a file of weights"
    )
    group.add_argument(
        "--heads", type=positive, metavar="N", help="of the weights of --init-from, where their file does not tell"
    )
    group.add_argument(
        "--accept-changed-data",
        action="store_true",
        help="go on with a run though its data have changed; run.json and the model card will say so",
    )
    group.add_argument("--seed", type=whole_number(0), help="of the order, the augmentation and the first weights")
    add_site_options(group)
    group.add_argument(
        "--set",
        metavar="SECTION.KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="change one value of the recipe; can be given several times",
    )
    group.add_argument(
        "--help-settings",
        action=_HelpSettings,
        nargs="?",
        metavar="WORD",
        help="list what --set can change, all or what has the word in its key or meaning; with --arch its values too",
    )
    return parser


class _HelpSettings(argparse.Action):
    """Lists settings and ends the program, as --help does."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, word: Any, option: str | None = None
    ) -> None:
        assert isinstance(parser, Parser)
        which = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        which.add_argument("--arch", "--config", dest="source")
        source = which.parse_known_args(parser.given)[0].source
        try:
            text = as_text(word or "", load_recipe(source) if source else None)
        except (KeyError, RecipeError) as error:
            parser.error(f"--help-settings: {error.args[0]}")
        show(text)
        parser.exit()


def add_site_options(group: argparse._ActionsContainer) -> None:
    """Adds --site and --no-site, for site_from."""
    group.add_argument(
        "--site",
        metavar="FILE",
        type=Path,
        help=f"site file [${SITE_VARIABLE}, else ~/.config/crate-dist/site.toml over site.toml in the clone]",
    )
    group.add_argument("--no-site", action="store_true", help="read no site file")


def site_from(arguments: argparse.Namespace) -> Site:
    """Reads the user's site files, as the options of recipe_parser have it. Raises RecipeError."""
    return load_site(arguments.site, not arguments.no_site)


def recipe_from(arguments: argparse.Namespace, site: Site = NO_SITE, may_be_unread: Collection[str] = ()) -> Recipe:
    """Loads the recipe that the options of recipe_parser name, with the site's data where nothing else names any.

    may_be_unread: as load_recipe has it. Raises RecipeError.

    A location that recipe.toml does not keep goes into the environment, which ranks and jobs inherit from this process.
    """
    data = arguments.data.expanduser().absolute() if isinstance(arguments.data, Path) else arguments.data
    recipe = load_recipe(
        arguments.config or arguments.arch,
        arguments.overrides,
        may_be_unread=may_be_unread,
        data__root=str(data) if data else None,
        train__seed=arguments.seed,
        train__init_from=str(arguments.init_from) if arguments.init_from else None,
        train__init_heads=arguments.heads,
    )
    # What the job reads must not depend on the environment of the node that it runs on, nor on its working folder.
    named = recipe.data.root or os.environ.get(DATA_VARIABLE)
    root = recipe.data.find_root(None if named else site.data)
    if is_private(root):
        os.environ[DATA_VARIABLE] = str(root)
    mirror = recipe.checkpoint.find_mirror()
    if mirror is not None and is_private(mirror):
        os.environ[MIRROR_VARIABLE] = str(mirror)
    mirror = recipe.checkpoint.mirror if mirror is None else mirror  # "": none, whatever the environment says
    data = recipe.data.model_copy(update={"root": root})
    checkpoint = recipe.checkpoint.model_copy(update={"mirror": mirror})
    init_from = recipe.train.init_from and recipe.train.init_from.expanduser().absolute()
    train = recipe.train.model_copy(update={"init_from": init_from})
    return recipe.model_copy(update={"data": data, "train": train, "checkpoint": checkpoint})


def default_run_dir(recipe: Recipe, site: Site = NO_SITE) -> Path:
    """Returns runs/NAME, or NAME in the site's folder of runs; with the seed behind it when it is not 0."""
    seed = recipe.train.seed
    return (site.runs or Path("runs")) / (recipe.name + (f"-seed{seed}" if seed else ""))
