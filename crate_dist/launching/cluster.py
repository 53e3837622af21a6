"""Options that ask SLURM for something, and what cannot be asked for. Imports no torch."""

from __future__ import annotations

import argparse
import math
import re
import shlex
from collections.abc import Sequence

from crate_dist.arguments import positive, whole_number
from crate_dist.config import ClusterSection, RecipeError
from crate_dist.slurm.options import CONTROL, Gpus, parse_minutes, parse_nodes

_RESOURCES = (
    *("--nodes", "--gpus-per-node", "--tasks-per-node", "--cpus-per-task", "--mem-gb", "--time", "--partition"),
    *("--account", "--qos", "--constraint", "--exclude", "--nice", "--comment"),
)
_ALSO = {
    "--sbatch": ("--gres", "--mem-per-cpu", "--mem-per-gpu", "--exclusive", "--reservation", "--licenses"),
    "--set": ("--signal-delay-s", "--requeues", "--restarts-in-place"),
}
"""What asks for resources and no more: options, and what else --sbatch and --set may say of them."""


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Adds --nodes, --partition and the like, and any other option of sbatch."""
    cluster = parser.add_argument_group(
        "cluster", "what is given here wins over the site file, and that over the recipe's [cluster] table"
    )
    cluster.add_argument(
        "--nodes", type=parse_nodes, metavar="N[-M]", help="or a range: as many as SLURM has; those train that divide"
    )
    cluster.add_argument(
        "--gpus-per-node", type=Gpus.parse, metavar="N", help="or with their type, as a100:8; 0: train on the CPU"
    )
    cluster.add_argument("--tasks-per-node", type=positive, metavar="N", help="ranks [one per GPU]")
    cluster.add_argument("--cpus-per-task", type=positive, metavar="N", help="cores of each rank, its loader's too")
    cluster.add_argument("--mem-gb", type=positive, metavar="GB", help="memory per node [all of it]")
    cluster.add_argument(
        "--time", type=parse_minutes, metavar="LIMIT", dest="time_min", help="minutes, or as 12:00:00 or 2-00:00:00"
    )
    cluster.add_argument("--partition", metavar="NAME", help="`sinfo -s` lists them")
    cluster.add_argument("--account", metavar="NAME", help="what pays for the job")
    cluster.add_argument("--qos", metavar="NAME", help="quality of service")
    cluster.add_argument("--constraint", metavar="FEATURES", help="features that the nodes must have, as 'h100&ib'")
    cluster.add_argument(
        "--exclude", action="append", default=[], metavar="NODES", help="nodes not to run on, as 'n[3-5],n9'"
    )
    cluster.add_argument(
        "--setup",
        action="append",
        metavar="LINE",
        help="shell line before the job, behind the site file's; can be given several times",
    )
    cluster.add_argument(
        "--container",
        metavar="IMAGE",
        help="image for srun --container-image (pyxis), with python3 and this project's dependencies in it",
    )
    options = parser.add_argument_group("other options of sbatch")
    options.add_argument(
        "--after",
        action="append",
        default=[],
        type=_job_id,
        metavar="JOB",
        help="start when that job has ended, well or not",
    )
    options.add_argument("--comment", metavar="TEXT", help="for squeue and the accounting")
    options.add_argument("--nice", type=whole_number(0), metavar="N", help="give way to other jobs by so much priority")
    options.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION[=VALUE]",
        help="any other one, as gres=gpu:8, reservation=course, dependency=afterok:17, exclusive; several times",
    )


def check_cluster(cluster: ClusterSection) -> None:
    """Raises RecipeError: ranks without a GPU of their own, or no time to train."""
    if 0 < cluster.gpus_per_node < cluster.ranks_per_node:
        raise RecipeError(
            f"{cluster.ranks_per_node} tasks per node on {cluster.gpus_per_node} GPUs, and each rank needs its own; "
            f"--tasks-per-node {cluster.gpus_per_node} would do, or --gpus-per-node 0 to train on the CPU"
        )
    if cluster.signal_delay_s >= cluster.time_min * 60:
        raise RecipeError(
            f"a time limit of {cluster.time_min} minutes with a warning {cluster.signal_delay_s} s before it leaves no "
            f"time to train; --time {math.ceil(cluster.signal_delay_s / 60) + 1} or more, "
            "or --set cluster.signal_delay_s=SECONDS"
        )


def asked_again(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Returns the options, each with its value, that a person gave to ask SLURM for something.

    Left out are those of one start alone (--after); of shell lines, images and --notify there is no value.
    """
    found: list[tuple[str, str]] = []
    for option in (*_RESOURCES, "--sbatch", "--mail", "--setup", "--container", "--notify"):
        value = getattr(arguments, "time_min" if option == "--time" else option[2:].replace("-", "_"), None)
        if isinstance(value, Gpus):
            value = f"{value.kind}:{value.number}" if value.kind else value.number
        if option in ("--setup", "--container", "--notify"):
            value = "" if value else None
        found += [(option, str(one)) for one in (value if isinstance(value, list) else [value]) if one is not None]
    sets = [text for text in arguments.overrides if text.strip().startswith("cluster.")]
    return found + [("--set", text) for text in sets if _name("--set", text) not in ("--setup", "--container")]


def repeated(before: Sequence[tuple[str, str]], options: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the options of a start before that are given again, and those that only a person may.

    before: as asked_again has them, out of a run folder, which others may have written: of these, what asks for
    resources and no more is given again
    options: those given now, which win
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_cluster_options(parser)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--mail")
    parser.add_argument("--notify")
    now = {_name(*pair) for pair in asked_again(parser.parse_known_args(options)[0])}
    now |= {"--gres", "--gpus-per-node"} if now & {"--gres", "--gpus-per-node"} else set()
    again, missing = [], []
    for option, value in before:
        name = _name(option, value)
        if name in now:
            continue
        if name in (*_RESOURCES, *_ALSO.get(option, ())):
            again.append(f"{option}={value}")
        else:
            words = f"{option} {shlex.quote(value)}" if value else option
            missing.append(CONTROL.sub("…", words))  # a terminal would obey them
    return again, missing


def _name(option: str, value: str) -> str:
    """Names what an option says, however it is given: --nodes, of --set cluster.nodes=2 too."""
    if option not in ("--set", "--sbatch"):
        return option
    key = value.partition("=")[0].strip().removeprefix("--").removeprefix("cluster.").replace("_", "-")
    return "--time" if key == "time-min" else f"--{key}"


def _job_id(text: str) -> str:
    if not re.fullmatch(r"\d+(_\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected the id of a job, as 17, or 17_3 for a task of an array")
    return text
