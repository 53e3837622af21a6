"""Where each value of a job comes from: recipe < site < flags. Imports no torch."""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crate_dist.config import DATA_VARIABLE, Recipe, RecipeError, build_recipe
from crate_dist.config.keys import RENAMED, flatten
from crate_dist.config.recipe import find_recipe
from crate_dist.launching.site import Site
from crate_dist.locations import redacted
from crate_dist.slurm.options import Gpus, JobOptions, check_option, parse_gres, parse_option
from crate_dist.slurm.verdict import UNSET

DEFAULT = "default"
_FLAGS = {
    "data.root": ("--data", "data"),
    "train.seed": ("--seed", "seed"),
    "train.init_from": ("--init-from", "init_from"),
    "train.init_heads": ("--heads", "heads"),
}
_FLAG_OF = {"time_min": "--time", "exclude": "--exclude", "dependency": "--after"}
_OF_GPU_TASKS = ("gpus_per_node", "cpus_per_task")


@dataclass(frozen=True)
class Settled:
    """What a job asks for, and why."""

    recipe: Recipe
    options: JobOptions
    settings: dict[str, tuple[str, str]]
    """(value, origin) by name: the keys of [cluster], and options of sbatch."""


def settle(recipe: Recipe, arguments: argparse.Namespace, site: Site) -> Settled:
    """Puts the site's values, then the flags', over those of the recipe's [cluster] table.

    A list is added to and not replaced: set-up lines, and nodes to be excluded. What the site says of GPUs is no matter
    to a recipe that wants none. Raises RecipeError.
    """
    source = str(find_recipe(arguments.config or arguments.arch))
    by_set = {text.partition("=")[0].strip().removeprefix("cluster.") for text in arguments.overrides}
    values: dict[str, Any] = recipe.cluster.model_dump()
    origins = {key: f"--set cluster.{key}" if key in by_set else source for key in recipe.cluster.model_fields_set}
    for_cpu = recipe.cluster.gpus_per_node == 0

    for key, (value, origin) in _site_values(site).items():
        if key not in by_set and not (for_cpu and key in _OF_GPU_TASKS):
            values[key], origins[key] = value, origin
    asked = _options(arguments, site)
    flags = {key: getattr(arguments, key, None) for key in values}
    for key, value in flags.items():
        if value is not None:
            values[key] = value.number if isinstance(value, Gpus) else value
            origins[key] = _FLAG_OF.get(key, f"--{key.replace('_', '-')}")
    form, gres = _gpu_form(flags["gpus_per_node"], asked, site)
    if gres and gres[0] is not None:
        if flags["gpus_per_node"] is not None and gres[0] != values["gpus_per_node"]:
            raise RecipeError(f"--gpus-per-node {values['gpus_per_node']} and {gres[1]}: give one of them")
        values["gpus_per_node"], origins["gpus_per_node"] = gres
    if values["gpus_per_node"] and source == origins.get("tasks_per_node", "") != origins.get("gpus_per_node"):
        del values["tasks_per_node"], origins["tasks_per_node"]  # one per GPU, whatever the recipe's CPU ranks are
    if line := next((line for line in (*site.setup, *values["setup"]) if line.lstrip().startswith("#SBATCH")), None):
        raise RecipeError(f"sbatch would read the set-up line {line!r} as an option of its own; --sbatch gives those")
    if lines := list(site.setup_lines()):
        values["setup"] = (*lines, *values["setup"])
        origins["setup"] = " and ".join(dict.fromkeys([*_files_of_setup(site), *filter(None, [origins.get("setup")])]))
    for key, said in recipe.cluster.withheld.items():
        if origins.get(key, source) == source:
            raise RecipeError(said)
    settled = build_recipe({**recipe.model_dump(), "cluster": values}, origin=_named(site, "the command line"))
    notify = arguments.notify or site.notify or ""
    options = JobOptions(form, {name: value for name, (value, _) in asked.items()}, notify, arguments.stuck_after)
    settings = {key: (_text(value), origins.get(key, DEFAULT)) for key, value in settled.cluster.model_dump().items()}
    settings["tasks_per_node"] = str(settled.cluster.ranks_per_node), origins.get("tasks_per_node", "one per GPU")
    if settings["gpus_per_node"][0] != "0":  # with their type, where one is asked for
        gpus = form.partition("=")[2].removeprefix("gpu:").replace("{n}", settings["gpus_per_node"][0])
        settings["gpus_per_node"] = gpus, settings["gpus_per_node"][1]
    settings |= {name: (_text(value), origin) for name, (value, origin) in asked.items()}
    for key in ("partition", "account", "qos", "constraint"):
        if settings[key][0] == UNSET and (value := os.environ.get(f"SBATCH_{key.upper()}")):
            settings[key] = value, f"$SBATCH_{key.upper()}"
    return Settled(settled, options, settings)


def origin_of(recipe: Recipe, arguments: argparse.Namespace, site: Site) -> dict[str, tuple[str, str]]:
    """Returns (value, origin) of all that somebody has said of a recipe outside [cluster], by flat key."""
    path = find_recipe(arguments.config or arguments.arch)
    in_file = {RENAMED.get(key, key) for key in flatten(tomllib.loads(path.read_text(encoding="utf-8")))}
    by_set = {text.partition("=")[0].strip() for text in arguments.overrides}
    set_as = {RENAMED.get(key, key): f"--set {key}" for key in by_set}
    said = {}
    for key, value in flatten(recipe.model_dump()).items():
        flag, name = _FLAGS.get(key, ("", ""))
        if key.startswith("cluster."):
            continue
        if origin := set_as.get(key) or (flag if name and getattr(arguments, name, None) is not None else ""):
            said[key] = origin
        elif key in in_file:
            said[key] = str(path)
        elif key == "data.root":
            said[key] = site.origins["data"] if site.data and value == site.data else f"${DATA_VARIABLE}"
    values = flatten(recipe.model_dump())
    return {key: (_text(values[key]), origin) for key, origin in said.items()}


def as_table(said: Mapping[str, tuple[str, str]]) -> str:
    """Lays out values with their origins in columns."""
    rows = []
    for key, (value, origin) in said.items():
        first, *more = value.splitlines() or [""]
        rows += [(key, first, origin), *(("", line, "") for line in more)]
    wide, room = max(len(key) for key, _, _ in rows), min(max(len(value) for _, value, _ in rows), 40)
    return "\n".join(f"  {key:<{wide}}  {value:<{room}}  {origin}".rstrip() for key, value, origin in rows)


def _site_values(site: Site) -> dict[str, tuple[Any, str]]:
    """Keys of [cluster] that the site says, with their files."""
    keys = ("partition", "account", "qos", "constraint", "cpus_per_task", "mem_gb", "container")
    found = {key: (getattr(site, key), site.origins[key]) for key in keys if getattr(site, key) is not None}
    if site.time is not None:
        found["time_min"] = site.time, site.origins["time"]
    if key := site.key_of_gpus:
        found["gpus_per_node"] = site.gpus, site.origins[key]
    return found


def _options(arguments: argparse.Namespace, site: Site) -> dict[str, tuple[str | bool, str]]:
    """Options of sbatch that the site and the flags give, with their origins. Raises RecipeError."""
    said: dict[str, tuple[str | bool, str]] = {}
    if mail := arguments.mail or site.mail:
        origin = "--mail" if arguments.mail else site.origins["mail"]
        said |= {"mail-user": (mail, origin), "mail-type": ("END,FAIL,REQUEUE", origin)}
    said |= {name: (value, site.origins[f"sbatch.{name}"]) for name, value in site.sbatch.items()}
    flags = [(*parse_option(text, f"--sbatch {text}"), f"--sbatch {text}") for text in arguments.sbatch]
    flags += [("exclude", check_option("exclude", nodes, "--exclude"), "--exclude") for nodes in arguments.exclude]
    if arguments.mail is not None:
        flags.append(("mail-user", check_option("mail-user", arguments.mail, "--mail"), "--mail"))
    if arguments.after:
        flags.append(("dependency", f"afterany:{':'.join(arguments.after)}", "--after"))
    for name in ("comment", "nice"):
        if (value := getattr(arguments, name)) is not None:
            flags.append((*parse_option(f"{name}={value}", f"--{name}"), f"--{name}"))
    seen: dict[str, tuple[str | bool, str]] = {}
    for name, value, origin in flags:
        if name == "exclude" and name in seen:
            value, origin = f"{seen[name][0]},{value}", f"{seen[name][1]} and {origin}"
        elif name in seen:
            raise RecipeError(f"{seen[name][1]} and {origin}: give one of them")
        seen[name] = value, origin
    of_site = (site.exclude, site.origins.get("exclude", "")) if site.exclude else None
    lists = [said_by for said_by in (of_site, said.get("exclude"), seen.get("exclude")) if said_by]
    if lists:
        nodes, origins = zip(*lists, strict=True)
        seen["exclude"] = ",".join(map(str, nodes)), " and ".join(dict.fromkeys(origins))
    return said | seen


def _gpu_form(
    flag: Gpus | None, asked: dict[str, tuple[str | bool, str]], site: Site
) -> tuple[str, tuple[int | None, str] | None]:
    """Returns the option that asks for GPUs, and their number, where --sbatch gres=… says it, with its origin.

    Leaves in `asked` what else that one asks for.
    """
    form = site.gpu_form
    if flag and flag.kind:
        form = f"gres=gpu:{flag.kind}:{{n}}" if site.gres else flag.form
    gres, origin = asked.get("gres", ("", ""))
    if not isinstance(gres, str) or not gres:
        return form, None
    number, form_of_gres, others = parse_gres(gres)
    del asked["gres"]
    if others:
        asked["gres"] = others, origin
    return form_of_gres or form, (number, origin)


def _files_of_setup(site: Site) -> list[str]:
    keys = ("modules", "purge", "environment", "setup")
    return [file for key, file in site.origins.items() if key.partition(".")[0] in keys]


def _named(site: Site, last: str) -> str:
    return " and ".join([*site.files, last])


def _text(value: Any) -> str:
    if value is None:
        return UNSET
    if isinstance(value, tuple):
        return ("\n" if all(isinstance(item, str) for item in value) else ", ").join(map(str, value)) or UNSET
    if isinstance(value, Path) or (isinstance(value, str) and ("://" in value or value.startswith("pipe:"))):
        return redacted(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
