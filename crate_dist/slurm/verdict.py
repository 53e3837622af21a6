"""What SLURM says of a job before it is queued, and which setting it means when it refuses."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

Settings = Mapping[str, tuple[str, str]]
"""Settings of a job: (value, where it came from) by name, as `partition`, or an option of sbatch, as `reservation`."""

_SINFO = "`sinfo --summarize` lists the partitions, their time limits and nodes"
_GRES = "`sinfo --format='%P %D %G'` lists what the nodes of each partition have"
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
_FOR_THE_MOMENT = (
    r"nodes? (is|are) busy|down, drained|contact slurm controller|timed out|temporarily|socket|not respond"
)


@dataclass(frozen=True)
class Verdict:
    """What `sbatch --test-only` says of a job. `accepted` is None where it could not say: as without an sbatch."""

    accepted: bool | None
    said: str

    @property
    def start(self) -> str:
        """When the job would start and where, as SLURM estimates it now; empty where it has said nothing of that."""
        said = re.search(
            r"to start at (\S+) using (\d+) processors on (?:nodes )?(\S+)(?: in partition (\S+))?", self.said
        )
        if not said:
            return ""
        where = f" of partition {said[4]}" if said[4] else ""
        return f"{said[1].replace('T', ' ')} on {said[3]}{where}, by what is queued now"


def ask(script: str, environment: Mapping[str, str]) -> Verdict:
    """Asks SLURM whether it would take a batch script, and when it would start it; queues nothing."""
    if not shutil.which("sbatch"):
        return Verdict(None, "there is no sbatch on this machine to ask")
    try:
        done = subprocess.run(
            ["sbatch", "--test-only"], input=script, env=environment, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Verdict(None, f"sbatch does not answer: {error}")
    said = (done.stderr.strip() or done.stdout.strip()).strip()
    if done.returncode == 0:
        return Verdict(True, said)
    return Verdict(None if re.search(_FOR_THE_MOMENT, said, re.IGNORECASE) else False, said or "it did not say why")


def refusal(said: str, settings: Settings) -> str:
    """Says what sbatch said, which setting it means, where that came from, and what would do."""
    words = "; ".join(_plain(line) for line in said.splitlines() if _plain(line))
    lines = [f"sbatch refused the job: {words}; nothing is queued"]
    meant, remedy = _meant(said, settings)
    for name in meant:
        value, origin = settings.get(name, ("", "not set"))
        if value:
            lines.append(f"  {name} = {value}, from {origin}")
        elif len(meant) <= 3 and name.replace("_", "").isalpha():
            lines.append(f"  {name} is not set")
    return "\n".join([*lines, f"  {remedy}"] if remedy else lines)


def _meant(said: str, settings: Settings) -> tuple[tuple[str, ...], str]:
    if option := re.search(r"--([a-z][a-z-]+)\b(?!.*--help\")", said):
        name = option[1].replace("-", "_")
        for known in (option[1], name, f"{name}_min"):
            if known in settings:
                return (known,), ""
    for pattern, names, remedy in _COMPLAINTS:
        if re.search(pattern, said, re.IGNORECASE):
            return names, remedy
    return tuple(name for name in settings if name in ("partition", "account", "qos")), _MINE


def _plain(line: str) -> str:
    line = re.sub(r"^(sbatch: )?(error: )?(Batch job submission failed: |allocation failure: )?", "", line.strip())
    return "" if line.startswith('Try "sbatch --help"') else line
