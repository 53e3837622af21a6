"""Options of sbatch, as its users write them, and those that are the launcher's own."""

from __future__ import annotations

import argparse
import math
import re
import shutil
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from crate_dist.config import ClusterSection, RecipeError
from crate_dist.config.keys import nearest
from crate_dist.config.sections import node_count

_LOGS = "the logs lie in the run folder, which --run-dir names"
_GPUS = "--gpus-per-node N, or TYPE:N; `gres` in the site file where the cluster wants that"
_REQUEUED = "the job is requeued until the run is complete; --set cluster.requeues=0 has it never requeued"
_ITS_ANSWER = "the launcher reads what sbatch answers"
_ENVIRONMENT = "the job gets your environment, and [environment] of the site file"
OWNED: Mapping[str, str] = {
    **dict.fromkeys(("ntasks", "ntasks-per-node", "tasks-per-node"), "--tasks-per-node N"),
    **dict.fromkeys(("gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket", "ntasks-per-gpu"), _GPUS),
    **dict.fromkeys(("output", "error", "input", "open-mode", "chdir"), _LOGS),
    **dict.fromkeys(("requeue", "no-requeue"), _REQUEUED),
    **dict.fromkeys(("parsable", "quiet", "wait", "verbose", "help", "usage", "version"), _ITS_ANSWER),
    **dict.fromkeys(("export", "export-file", "get-user-env"), _ENVIRONMENT),
    "account": "--account NAME",
    "array": "--seeds N …, or --grid",
    "clusters": "start it on a login node of that cluster",
    "constraint": "--constraint FEATURES",
    "container": "--container IMAGE",
    "cpus-per-task": "--cpus-per-task N",
    "job-name": "--set name=NAME",
    "mem": "--mem-gb GB",
    "nodes": "--nodes N",
    "partition": "--partition NAME",
    "qos": "--qos NAME",
    "signal": "--set cluster.signal_delay_s=SECONDS",
    "test-only": "--test-only",
    "time": "--time LIMIT",
    "wrap": "the job is the training of the recipe",
}
"""Options of sbatch that the launcher gives, and what says their values."""

_FREE = """
    acctg-freq batch bb bbf begin cluster-constraint comment contiguous core-spec cores-per-socket cpu-freq
    cpus-per-gpu deadline delay-boot dependency distribution exclude exclusive extra extra-node-info gpu-bind
    gpu-freq gres gres-flags hint hold ignore-pbs kill-on-invalid-dep licenses mail-type mail-user mcs-label
    mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-kill nodefile nodelist ntasks-per-core
    ntasks-per-socket oom-kill-step overcommit oversubscribe power prefer priority profile propagate reboot
    reservation resv-ports segment sockets-per-node spread-job stepmgr switches thread-spec threads-per-core
    time-min tmp tres-bind tres-per-task use-min-nodes wait-all-nodes wckey x11
"""
"""The other options, of SLURM from 19.05 to 25.05."""

_LETTERS = """
        A:account B:extra-node-info C:constraint D:chdir G:gpus H:hold J:job-name L:licenses M:clusters N:nodes
        O:overcommit Q:quiet S:core-spec V:version W:wait a:array b:begin c:cpus-per-task d:dependency e:error
        i:input k:no-kill m:distribution n:ntasks o:output p:partition q:qos s:oversubscribe t:time v:verbose
        w:nodelist x:exclude
"""
_SHORT = {letter: name for letter, _, name in (pair.partition(":") for pair in _LETTERS.split())}
"""The options by the letter that stands for them."""

_VARIABLES: Mapping[str, tuple[str, ...]] = {
    "array": ("ARRAY_INX",),
    "gpus-per-node": ("GPUS_PER_NODE", "GPUS", "GPUS_PER_TASK"),
    "gres": ("GRES", "GPUS_PER_NODE", "GPUS", "GPUS_PER_TASK"),
    "mem": ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"),
    "requeue": ("REQUEUE", "NO_REQUEUE"),
    "switches": ("REQ_SWITCH",),
    "time": ("TIMELIMIT",),
}
"""sbatch's variables for an option that are not called as it is, without SBATCH_."""

CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")
"""What would not stay on its line of the batch script."""
_MEMORY = ("mem-per-cpu", "mem-per-gpu")
GPU_FORM = "gpus-per-node={n}"
"""How the GPUs of a node are asked for, unless something says otherwise."""


@dataclass(frozen=True)
class JobOptions:
    """What a job asks for beside the recipe's [cluster] table; the user alone says it, and no recipe keeps it."""

    gpu_form: str = GPU_FORM
    """The option that asks for the GPUs of a node, {n} standing for their number."""
    sbatch: Mapping[str, str | bool] = field(default_factory=dict)
    """Options by their names; True: without a value."""
    notify: str = ""
    """Command that is told when a run is done, has failed for good, or is stuck; none: nobody is."""
    stuck_after_min: int = 30

    def of(self, cluster: ClusterSection) -> dict[str, str | bool]:
        """Returns the options by their names, those for GPUs and memory with them."""
        asked = dict(self.sbatch)
        if cluster.gpus_per_node:
            name, _, value = self.gpu_form.partition("=")
            value = value.replace("{n}", str(cluster.gpus_per_node))
            also = asked.get(name)
            asked[name] = f"{value},{also}" if isinstance(also, str) else value
        if not asked.keys() & set(_MEMORY):
            asked["mem"] = f"{cluster.mem_gb}GB" if cluster.mem_gb else "0"  # 0: all that the node has
        return asked


USUAL = JobOptions()
"""Of who asks for nothing besides."""


class Gpus(NamedTuple):
    """GPUs of a node, as `--gpus-per-node` and `--gres` name them."""

    number: int
    kind: str | None

    @classmethod
    def parse(cls, text: str) -> Gpus:
        """Reads N or TYPE:N. Raises argparse.ArgumentTypeError."""
        match = re.fullmatch(r"(?:([A-Za-z0-9_.-]*[A-Za-z_.-][A-Za-z0-9_.-]*):)?(\d+)", text.strip())
        if not match:
            raise argparse.ArgumentTypeError(
                f"{text!r}: expected a whole number from 0 on, or with the type before it, such as a100:4"
            )
        return cls(int(match[2]), match[1])

    @property
    def form(self) -> str:
        """The option that asks for as many of this type."""
        return f"gpus-per-node={self.kind}:{{n}}" if self.kind else GPU_FORM


def parse_gres(text: str) -> tuple[int | None, str | None, str]:
    """Splits a value of --gres: the number of GPUs, None where `{n}` stands for it; their form; what is no GPU.

    "gpu:a100:4,lustre:1" -> 4, "gres=gpu:a100:{n}", "lustre:1"; a form of None: there is no GPU in it.
    Raises RecipeError.
    """
    gpus = [entry for entry in text.split(",") if re.fullmatch(r"gpu(:.*)?", entry)]
    others = ",".join(entry for entry in text.split(",") if entry not in gpus)
    if not gpus:
        return None, None, others
    match = re.fullmatch(r"gpu(?P<kind>:[A-Za-z0-9_.-]*[A-Za-z_.-][A-Za-z0-9_.-]*)?(?::(?P<count>\d+|\{n\}))?", gpus[0])
    if not match or len(gpus) > 1:
        raise RecipeError(f"gres={text}: expected gpu:N or gpu:TYPE:N for the GPUs, such as gpu:a100:4, and that once")
    count = match["count"] or "1"
    return (None if count == "{n}" else int(count)), f"gres=gpu{match['kind'] or ''}:{{n}}", others


def parse_option(text: str, origin: str) -> tuple[str, str | bool]:
    """Reads OPTION=VALUE, or an OPTION that takes none, of sbatch. Raises RecipeError with the origin in it."""
    name, equals, value = text.strip().removeprefix("--").partition("=")
    return name, check_option(name, value if equals else True, origin)


def check_option(name: str, value: str | bool, origin: str) -> str | bool:
    """Returns the value of an option of sbatch that is a user's to give.

    Raises RecipeError: it is the launcher's own, not known, or would not stay on its line of the batch script.
    """
    if name in OWNED:
        raise RecipeError(f"{origin}: sbatch's --{name} is the launcher's own: {OWNED[name]}")
    if name not in known_options():
        hint = nearest(name, sorted(known_options()))
        raise RecipeError(
            f"{origin}: sbatch knows no option --{name}{hint}; expected OPTION=VALUE, or OPTION, by its long name"
        )
    if isinstance(value, bool):
        return value
    if CONTROL.search(value):
        raise RecipeError(f"{origin}: {value!r} has a control character in it, and would not stay on one line")
    if "\\" in value:
        raise RecipeError(f"{origin}: sbatch would misread the backslash in {value!r} in a batch script; leave it out")
    if not value:
        raise RecipeError(f"{origin}: no value behind the =; {name}=VALUE, or {name} alone where it takes none")
    return value


def given_here(option: str, value: str) -> str:
    """Says how an option of sbatch, as `--gres` or `-N`, and its value are given here; empty: it is none of sbatch."""
    if option[1:2] != "-" and option[1:2] in _SHORT:
        name, value = _SHORT[option[1]], option[2:] or value
    else:
        name = option.removeprefix("--")
    if name in ("comment", "exclude", "nice"):
        return f"here it is --{name} {value}".rstrip()
    if name in _FREE.split() and name != "batch":  # a batch is one of images here
        return f"here it is --sbatch {name}{f'={value}' if value else ''}"
    if name not in OWNED:
        return ""
    said = "--gpus-per-node N" if name == "gpus" else OWNED[name]
    if name == "mem":
        value = value.upper().removesuffix("B").removesuffix("G") if re.fullmatch(r"\d+GB?", value.upper()) else ""
    if value and name != "ntasks" and re.fullmatch(r"--[a-z-]+ (name=)?[A-Z]+", said):
        said = re.sub(r"[A-Z]+$", lambda placeholder: value, said)
    return f"here it is {said}" if said.startswith("--") else said


@cache
def known_options() -> Collection[str]:
    """Names the options of sbatch: those of its manual, and what this machine's says of itself, its plugins' too."""
    known = {*_FREE.split(), *OWNED}
    if shutil.which("sbatch"):
        try:
            said = subprocess.run(["sbatch", "--help"], capture_output=True, text=True, timeout=20).stdout
        except (OSError, subprocess.TimeoutExpired):
            return known
        known |= set(re.findall(r"^ {1,8}(?:-\w,? +)?--([a-z][a-z0-9-]+)", said, re.MULTILINE))
    return known


def outvoted(script: str, environment: Collection[str]) -> list[str]:
    """Names the variables by which sbatch would do otherwise than a batch script says; for it they win."""
    asked = re.findall(r"^#SBATCH --([a-z-]+)", script, re.MULTILINE)
    names = {name for option in asked for name in _VARIABLES.get(option, (option.upper().replace("-", "_"),))}
    return sorted({f"SBATCH_{name}" for name in (*names, "WAIT")} & set(environment))


def parse_minutes(text: str) -> int:
    """Reads SLURM's notations of a time limit (90, 90:00, 12:00:00, 2-00, …) as minutes, rounded up."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no time limit; 90 (minutes), 12:00:00 or 2-00:00:00 would be")
    days, *parts = match.groups()
    first, second, third = (int(part) if part else 0 for part in parts)
    if days is None and parts[2] is None:  # minutes[:seconds]; all others begin with hours
        return math.ceil(first + second / 60)
    return int(days or 0) * 1440 + first * 60 + math.ceil(second + third / 60)


def as_limit(minutes: int) -> str:
    """Writes minutes as SLURM does a time limit: 12:00:00, 2-00:00:00."""
    days, rest = divmod(minutes, 1440)
    return f"{days}-{rest // 60:02}:{rest % 60:02}:00" if days else f"{rest // 60:02}:{rest % 60:02}:00"


def parse_nodes(text: str) -> int | str:
    """Reads a number of nodes, or a range of them."""
    try:
        return node_count(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
