"""What SLURM says of a job before it is queued, and which setting it means when it refuses."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from crate_dist.config import ClusterSection
from crate_dist.slurm.options import as_limit, parse_minutes

Settings = Mapping[str, tuple[str, str]]
"""Settings of a job: (value, where it came from) by name, as `partition`, or an option of sbatch, as `reservation`."""

UNSET = "unset"
"""The value of a setting that nobody has set."""

_SINFO = "`sinfo --summarize` lists the partitions, their time limits and nodes"
_GRES = "`sinfo --format='%P %D %c %m %G'` lists the nodes of each partition: their number, cores, MB of memory, GPUs"
_MINE = "`sacctmgr show associations user=$USER format=account,partition,qos` lists what is yours"
_SHAPE = ("nodes", "gpus_per_node", "gres", "tasks_per_node", "cpus_per_task", "mem_gb", "constraint", "exclude")
_COMPLAINTS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (r"QOSMaxWall|AssocMaxWall|MaxTime|Requested time limit|time limit is invalid", ("time_min", "qos"), _SINFO),
    (r"(QOS|Assoc)\w*Node", ("nodes", "qos", "account"), "fewer nodes, or another qos"),
    (r"(QOS|Assoc)\w*(GRES|TRES|Gpu)", ("nodes", "gpus_per_node", "qos", "account"), "fewer GPUs, or another qos"),
    (r"(QOS|Assoc)\w*Cpu", ("nodes", "cpus_per_task", "tasks_per_node", "qos"), "fewer cores, or another qos"),
    (r"(QOS|Assoc)\w*Mem", ("mem_gb", "qos"), "less memory, or another qos"),
    (r"(QOS|Assoc)\w*Job", ("qos", "account"), "as many jobs as this qos allows are queued already: wait for one"),
    (r"account/partition combination|invalid account|no account", ("account", "partition"), _MINE),
    (r"invalid qos", ("qos", "account", "partition"), _MINE),
    (r"accounting/QOS policy", ("account", "qos", "nodes", "time_min"), _MINE),
    (r"partition", ("partition", "account"), _SINFO),
    (r"node configuration is not available", _SHAPE, f"no node of the partition has all of that; {_GRES}"),
    (r"node count specification", ("nodes", "partition"), _SINFO),
    (r"CPU count|more processors", ("cpus_per_task", "tasks_per_node", "nodes"), "fewer cores per task, or tasks"),
    (r"memory", ("mem_gb", "mem-per-gpu", "mem-per-cpu"), "less memory, or another partition"),
    (r"feature", ("constraint",), "`sinfo --format='%P %D %f'` lists the features of nodes"),
    (r"generic resource|\bgres\b", ("gres", "gpus_per_node"), _GRES),
    (r"reservation", ("reservation",), "`scontrol show reservation` lists them"),
    (r"node name", ("exclude", "nodelist"), "`sinfo --Node` lists the nodes"),
    (r"dependency", ("dependency",), "--after takes ids of jobs that SLURM still knows; `squeue --me` lists yours"),
    (r"license", ("licenses",), "`scontrol show licenses` lists them"),
    (r"nice|priority", ("nice", "priority"), "only administrators raise a priority: --nice takes a number from 0 on"),
    (r"mail", ("mail-type", "mail-user"), "a type such as END,FAIL"),
)
"""What sbatch may say, the settings that it may mean, and what would do. The first that fits is taken."""
_NOT_NOW = r"node configuration is not available|partition not available|nodes? (is|are) busy|down, drained"
_NO_ANSWER = r"configuration source|contact slurm|timed out|temporarily|not respond"


@dataclass(frozen=True)
class Verdict:
    """What `sbatch --test-only` says of a job.

    "not now": of nodes that are down it says the same as of those that do not exist, and a job may wait for them
    "unknown": there is no sbatch, or none that answers
    """

    answer: Literal["yes", "no", "not now", "unknown"]
    said: str

    @property
    def start(self) -> str:
        """When the job would start and where, as SLURM estimates it now; empty where it has said nothing of that."""
        line = r"to start at (\S+) using \d+ processors on (?:nodes )?(\S+)(?: in partition (\S+))?"
        if not (said := re.search(line, self.said)):
            return ""
        where = f" of partition {said[3]}" if said[3] else ""
        return f"{said[1].replace('T', ' ')} on {said[2]}{where}, by what is queued now"


def ask(script: str, environment: Mapping[str, str]) -> Verdict:
    """Asks SLURM whether it would take a batch script, and when it would start it; queues nothing."""
    if not shutil.which("sbatch"):
        return Verdict("unknown", "there is no sbatch on this machine to ask")
    try:
        done = subprocess.run(
            ["sbatch", "--test-only"], input=script, env=environment, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Verdict("unknown", f"sbatch does not answer: {error}")
    said = done.stderr.strip() or done.stdout.strip() or "it did not say why"
    if done.returncode == 0:
        return Verdict("yes", said)
    if re.search(_NO_ANSWER, said, re.IGNORECASE):
        return Verdict("unknown", f"SLURM does not answer: {as_sentence(said)}")
    return Verdict("not now" if re.search(_NOT_NOW, said, re.IGNORECASE) else "no", said)


def beyond_partition(cluster: ClusterSection, settings: Settings) -> str:
    """Says what the partition has too little of, for which SLURM lets a job wait for ever; empty: of nothing.

    Of several partitions one must do. Where SLURM does not answer, nothing is said.
    """
    try:
        done = subprocess.run(
            ["scontrol", "--oneliner", "show", "partition"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    wanted = settings["partition"][0].split(",") if settings["partition"][0] != UNSET else []
    complaints = []
    for line in done.stdout.splitlines():
        facts = dict(re.findall(r"(\w+)=(\S*)", line))
        name = facts.get("PartitionName")
        if name not in wanted and (wanted or facts.get("Default") != "YES"):
            continue
        largest = min(int(n) for n in (facts.get("MaxNodes", ""), facts.get("TotalNodes", "")) if n.isdigit())
        longest = facts.get("MaxTime", "UNLIMITED")
        if cluster.node_counts[0] > largest:
            asked = f"{_said('nodes', settings)} (--nodes {largest} would do)"
            complaints.append(f"partition {name} gives a job {largest} nodes at most, not {asked}")
        elif longest[0].isdigit() and cluster.time_min > parse_minutes(longest):
            on = ", as the job is requeued until the run is complete" if cluster.requeues else ""
            asked = f"{as_limit(cluster.time_min)}, from {settings['time_min'][1]} (--time {longest} would do{on})"
            complaints.append(f"partition {name} ends jobs after {longest}, not {asked}")
        else:
            return ""
    return "; ".join(complaints)


def qos_beyond(settings: Settings) -> str:
    """Says which qos may let a job go beyond its partition, of the one asked for, else of all; empty: none."""
    try:
        done = subprocess.run(
            ["sacctmgr", "--noheader", "--parsable2", "show", "qos", "format=name,flags"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    asked, found = settings["qos"][0], []
    for line in done.stdout.splitlines():
        name, _, flags = line.partition("|")
        if asked in (name, UNSET) and re.search("PartitionMaxNodes|PartitionTimeLimit", flags):
            found.append(name)
    return f"the qos {' or '.join(found)} may allow that" if found else ""


def refusal(said: str, settings: Settings, environment: Mapping[str, str] = MappingProxyType({})) -> str:
    """Says what sbatch said, which setting it means, where that came from, and what would do.

    environment: sbatch's own, whose variables may ask for something that no setting says
    """
    meant, remedy = _meant(said, settings)
    if not meant and (asked := [f"${name}={environment[name]}" for name in environment if name.startswith("SBATCH_")]):
        remedy = f"sbatch also obeys your environment: {', '.join(asked)}; unset what is not meant"
    lines = [f"sbatch refused the job: {as_sentence(said)}; nothing is queued"]
    lines += [f"  {name} = {_said(name, settings)}" for name in meant if settings.get(name, (UNSET,))[0] != UNSET]
    per_node = [settings.get(name, (UNSET,))[0] for name in ("tasks_per_node", "cpus_per_task")]
    if meant is _SHAPE and all(number.isdecimal() for number in per_node):
        lines.append(f"  in all {math.prod(map(int, per_node))} cores on each node")
    if unset := [name for name in meant if settings.get(name, ("", ""))[0] == UNSET and len(meant) < len(_SHAPE)]:
        lines.append(f"  {' and '.join(unset)} {'is' if len(unset) == 1 else 'are'} not set")
    return "\n".join([*lines, f"  {remedy}"] if remedy else lines)


def as_sentence(said: str) -> str:
    """Puts the lines of sbatch's complaint into one, without what stands before each of them."""
    before = r"^(sbatch: )?((error|fatal): )?(Batch job submission failed: |allocation failure: )?"
    lines = [re.sub(before, "", line.strip()) for line in said.splitlines()]
    return "; ".join(line for line in lines if line and not line.startswith("Try "))


def _said(name: str, settings: Settings) -> str:
    value, origin = settings[name]
    return f"{value}, from {origin}"


def _meant(said: str, settings: Settings) -> tuple[tuple[str, ...], str]:
    """The settings that sbatch means: an option that it names, else by what it complains of."""
    if (option := re.search(r"--([a-z][a-z-]+)", said)) and option[1] in settings:
        return (option[1],), ""
    for pattern, names, remedy in _COMPLAINTS:
        if re.search(pattern, said, re.IGNORECASE):
            return names, remedy
    return (), _MINE
