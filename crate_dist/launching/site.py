"""What this cluster wants of every job, said once by the user in a site file. Imports no torch.

A site file runs things on the user's account, as a recipe may not: it is read from two places alone, both of them the
user's, and never from a run folder or a working folder.
"""

from __future__ import annotations

import argparse
import grp
import json
import os
import pwd
import re
import shlex
import stat
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, ValidationError, field_validator

from crate_dist.config.keys import RecipeError, nearest
from crate_dist.config.recipe import CONFIG_DIR
from crate_dist.config.sections import Location, OneWord, Positive, Section
from crate_dist.launching.showing import show
from crate_dist.slurm.options import GPU_FORM, Gpus, check_option, parse_gres, parse_minutes
from crate_dist.world import VARIABLES

SITE_VARIABLE = "CRATE_SITE"
CLONE_FILE = CONFIG_DIR.parent / "site.toml"
_LOADS_MODULES = "command -v module >/dev/null || source /etc/profile  # which defines it, where bash does not"
_OWN_PREFIXES = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_", "CRATE_START", "CRATE_ENDED_STEPS")


_EXAMPLES = {
    "partition": 'partition = "gpu"',
    "account": 'account = "vision"',
    "qos": 'qos = "normal"',
    "constraint": 'constraint = "a100&ib"',
    "gpus_per_node": "gpus_per_node = 4",
    "gres": 'gres = "gpu:a100:{n}"',
    "cpus_per_task": "cpus_per_task = 12",
    "mem_gb": "mem_gb = 480",
    "time": 'time = "1-00:00:00"',
    "modules": 'modules = ["gcc/13", "cuda/12.4"]',
    "purge": "purge = true",
    "environment": 'environment.NCCL_SOCKET_IFNAME = "ib0"\nenvironment.https_proxy = "http://proxy:3128"',
    "setup": 'setup = ["ulimit -n 65536"]',
    "container": 'container = "/images/crate.sqsh"',
    "exclude": 'exclude = "n[3-5],n9"',
    "sbatch": 'sbatch.reservation = "course"\nsbatch.exclusive = true',
    "mail": 'mail = "me@example.org"',
    "notify": 'notify = "~/bin/tell-me"',
    "data": 'data = "/data/imagenet-shards"',
    "runs": 'runs = "/scratch/me/runs"',
}
"""What a key looks like, for the template."""


def _one_line(text: str) -> str:
    if re.search(r"[\x00-\x08\x0a-\x1f\x7f]", text):
        raise ValueError("has a line break or another control character in it")
    return text


def _minutes(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return parse_minutes(given)
    except argparse.ArgumentTypeError as error:
        raise ValueError(error) from error


def _listed(given: Any) -> Any:
    return ",".join(given) if isinstance(given, list) and all(isinstance(node, str) for node in given) else given


def _gpus(given: Any) -> Any:
    if isinstance(given, bool) or not isinstance(given, int | str):
        raise ValueError('expected a number, or "TYPE:NUMBER"')
    try:
        return Gpus.parse(str(given))
    except argparse.ArgumentTypeError as error:
        raise ValueError(error) from error


OneLine = Annotated[str, AfterValidator(_one_line)]


class Site(Section):
    """What every job on this cluster gets, unless a flag says otherwise."""

    partition: OneWord | None = Field(None, description="partition of the jobs")
    account: OneWord | None = Field(None, description="account that pays for them")
    qos: OneWord | None = Field(None, description="quality of service")
    constraint: OneWord | None = Field(None, description="features that the nodes must have")
    gpus_per_node: Annotated[Gpus, BeforeValidator(_gpus)] | None = Field(
        None, description='GPUs of each node: 8, or with their type, "a100:8"; no matter to a recipe for the CPU'
    )
    gres: str | None = Field(
        None, description='where the cluster wants --gres and not --gpus-per-node: "gpu:{n}", "gpu:a100:{n}"'
    )
    cpus_per_task: Positive | None = Field(None, description="cores of each GPU's task; no matter to one for the CPU")
    mem_gb: Positive | None = Field(None, description="gigabytes of memory of each node; unset: all of it")
    time: Annotated[Positive, BeforeValidator(_minutes)] | None = Field(
        None, description='time limit: minutes, or "12:00:00", "2-00:00:00"'
    )
    modules: tuple[OneWord, ...] = Field((), description="loaded in this order before anything else")
    purge: bool = Field(False, description="`module purge` before they are loaded")
    environment: Mapping[str, OneLine] = Field(
        default_factory=dict, description="variables of every rank: NCCL's and the like, proxies"
    )
    setup: tuple[OneLine, ...] = Field((), description="shell lines behind modules and environment")
    container: OneLine | None = Field(None, description="image for srun --container-image (pyxis)")
    exclude: Annotated[OneWord, BeforeValidator(_listed)] | None = Field(
        None, description='nodes that no job shall have: "n[3-5],n9", or a list'
    )
    sbatch: Mapping[str, str | bool] = Field(
        default_factory=dict, description='other options of sbatch: reservation = "x"; exclusive = true'
    )
    mail: OneWord | None = Field(None, description="address to which SLURM writes when a job ends")
    notify: OneLine | None = Field(None, description="command that is told when a run is done, failed or stuck")
    data: Location | None = Field(None, description="shards, where neither --data, the recipe nor $CRATE_DATA says it")
    runs: Path | None = Field(None, description="folder of the run folders that --run-dir does not name; unset: runs")

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def files(self) -> list[str]:
        """The files that were read, that of the clone first."""
        return list(dict.fromkeys(self._origins.values()))

    @property
    def origins(self) -> Mapping[str, str]:
        """The file that says a key, by keys; of an entry of a table, `environment.NAME`."""
        return self._origins

    @field_validator("environment", mode="before")
    @classmethod
    def _names(cls, given: Any) -> Any:
        for name, value in given.items() if isinstance(given, Mapping) else ():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is no name of a variable: letters, digits and _, and no digit first")
            if name.startswith(_OWN_PREFIXES) or (name in VARIABLES and not name.startswith("MASTER_")):
                raise ValueError(f"{name} is said by SLURM or the launcher")
            if not isinstance(value, str):
                raise ValueError(f'{name}: expected a text, such as "{value}", not {value!r}')
        return given

    @field_validator("sbatch", mode="before")
    @classmethod
    def _options(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        checked = {}
        for name, value in given.items():
            if value is False or isinstance(value, dict | list | float):
                raise ValueError(f"{name}: expected a text, a number, or true for an option without a value")
            if name == "gres" and parse_gres(str(value))[1]:
                raise ValueError('gres: the GPUs belong into the key gres of the file itself, as "gpu:{n}"')
            try:
                checked[name] = check_option(name, value if value is True else str(value), "sbatch")
            except RecipeError as error:
                raise ValueError(str(error)) from error
        return checked

    @field_validator("gres")
    @classmethod
    def _gpus_in_gres(cls, given: str | None) -> str | None:
        try:
            if given and not parse_gres(given)[1]:
                raise ValueError(f'{given!r}: expected the GPUs, as "gpu:{{n}}"; others under [sbatch]')
        except RecipeError as error:
            raise ValueError(str(error)) from error
        return given

    @field_validator("data", "runs")
    @classmethod
    def _anywhere(cls, given: Path | str | None) -> Path | str | None:
        given = given.expanduser() if isinstance(given, Path) else given
        if isinstance(given, Path) and not given.is_absolute():
            raise ValueError(f"{str(given)!r} depends on where a command is given; expected a path from / or ~ on")
        return given

    @property
    def key_of_gpus(self) -> str | None:
        """The key that says the number of GPUs: gres where that has one, unless a later file has gpus_per_node."""
        if not self.gres or parse_gres(self.gres)[0] is None:
            return "gpus_per_node" if self.gpus_per_node else None
        if not self.gpus_per_node:
            return "gres"
        # A later file's keys stand behind.
        apart = self._origins.get("gres") != self._origins.get("gpus_per_node")
        said = [key for key in self._origins if key in ("gres", "gpus_per_node")]
        return said[-1] if apart else "gres"

    @property
    def gpus(self) -> int | None:
        """GPUs of each node, as gres or gpus_per_node say."""
        if self.key_of_gpus == "gpus_per_node" and self.gpus_per_node:
            return self.gpus_per_node.number
        return parse_gres(self.gres)[0] if self.gres else None

    @property
    def gpu_form(self) -> str:
        """The option that asks for GPUs, as JobOptions takes it."""
        if self.gres:
            if self.key_of_gpus == "gpus_per_node" and self.gpus_per_node and self.gpus_per_node.kind:
                return f"gres=gpu:{self.gpus_per_node.kind}:{{n}}"
            return parse_gres(self.gres)[1] or GPU_FORM
        return self.gpus_per_node.form if self.gpus_per_node else GPU_FORM

    def setup_lines(self) -> Iterator[str]:
        """Yields the shell lines before the job: modules, environment, set-up."""
        if self.modules or self.purge:
            yield _LOADS_MODULES
        if self.purge:
            yield "module purge"
        if self.modules:
            load = shlex.join(["module", "load", *self.modules])
            failed = shlex.quote(f"{load} failed")
            yield f"{load} || {{ crate_fault={failed}; echo crate-dist: {failed}; exit 1; }}"
        for name, value in self.environment.items():
            yield f"export {name}={shlex.quote(value)}"
        yield from self.setup

    @classmethod
    def read(cls, files: list[Path]) -> Self:
        """Reads files, of which a later one says otherwise than those before. Raises RecipeError."""
        said: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for path in files:
            for key, value in _trusted(path).items():
                origins.pop(key, None)  # it comes behind those of the files before
                if isinstance(value, dict):
                    said[key] = {**said.get(key, {}), **value}
                    origins |= {f"{key}.{name}": str(path) for name in value}
                else:
                    said[key], origins[key] = value, str(path)
        try:
            site = cls.model_validate(said)
        except ValidationError as error:
            names = "; ".join(
                _complaint(item["type"], item["loc"], item["msg"], item["input"]) for item in error.errors()
            )
            raise RecipeError(f"{' and '.join(map(str, files))}: {names}") from error
        site._origins.update(origins)
        return site


NO_SITE = Site()
"""Of who has no site file."""


def template() -> str:
    """Returns a site file in which everything is a comment, from the keys themselves."""
    lines = [f"# {user_file()}: what every job on this cluster gets, unless a flag says otherwise. Keys: recipe < this"]
    lines += ["# file < flags. It may be yours alone to write: chmod go-w. docs/clusters.md has whole examples.", ""]
    for name, field in Site.model_fields.items():
        example = _EXAMPLES[name]
        lines += [f"# {field.description}", *(f"# {line}" for line in example.splitlines()), ""]
    return "\n".join(lines)


class PrintTemplate(argparse.Action):
    """Prints a site file to begin with, and ends the program, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        show(template().rstrip())
        parser.exit()


def load_site(given: Path | None = None, use: bool = True) -> Site:
    """Returns the user's settings of this site: of the file given, else of the two that site_files names.

    use: False leaves all of them out. Raises RecipeError.
    """
    if given and not given.is_file():
        raise RecipeError(f"--site {given}: there is no such file; `--site-template` prints one to begin with")
    return Site.read(([given] if given else site_files()) if use else [])


def site_files() -> list[Path]:
    """Returns the site files that are there: the clone's, then the user's own, which wins.

    $CRATE_SITE names another file instead of both; empty: none. Raises RecipeError when that is not there.
    """
    if (instead := os.environ.get(SITE_VARIABLE)) is not None:
        if instead and not Path(instead).is_file():
            raise RecipeError(f"{SITE_VARIABLE}={instead}: there is no such file; an empty one means none")
        return [Path(instead)] if instead else []
    return [path for path in (CLONE_FILE, user_file()) if path.is_file()]


def user_file() -> Path:
    """Returns where the user's own site file lies, or would."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    folder = Path(base) if base.startswith("/") else Path("~/.config").expanduser()
    return folder / "crate-dist" / "site.toml"


def _trusted(path: Path) -> dict[str, Any]:
    """Reads a file as TOML. Raises RecipeError: it is none, or others could have written it."""
    try:
        with path.open("rb") as file:
            _check_owner(path, os.fstat(file.fileno()))
            if path.parent != CLONE_FILE.parent:  # who may write there may change the code as well
                _check_owner(path.parent, path.parent.stat())
            return tomllib.loads(file.read().decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not TOML: {error}") from error
    except OSError as error:
        raise RecipeError(f"cannot read the site file {path}: {error.strerror}") from error


def _check_owner(path: Path, found: os.stat_result) -> None:
    runs = "and a site file runs things on your account"
    shared = bool(found.st_mode & stat.S_IWGRP) and not _is_own_group(found.st_gid)
    if shared or (found.st_mode & stat.S_IWOTH and not (path.is_dir() and found.st_mode & stat.S_ISVTX)):
        raise RecipeError(f"others may write to {path}, {runs}: chmod go-w {shlex.quote(str(path))}")
    if found.st_uid not in (0, os.getuid(), CONFIG_DIR.stat().st_uid):
        raise RecipeError(f"{path} belongs to another user, {runs}; copy it to {user_file()} if you trust it")


def _is_own_group(number: int) -> bool:
    """Tells whether a group is the user's private one, as where files are made writable for their group."""
    try:
        group, user = grp.getgrgid(number), pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return False
    return group.gr_name == user and set(group.gr_mem) <= {user}


def _complaint(kind: str, loc: tuple[int | str, ...], message: str, given: object) -> str:
    key = ".".join(map(str, loc))
    if kind == "extra_forbidden":
        return f"unknown key {key!r}{nearest(key, list(Site.model_fields))}"
    if kind == "tuple_type" and isinstance(given, str):
        return f"{key}: expected a list: {key} = [{json.dumps(given)}]"
    return f"{key}: {message.removeprefix('Value error, ')}"
