"""Converts a data set on many machines of a SLURM cluster: an array of jobs, each of which writes a part of the shards.

    python launch/prep.py --source /data/ILSVRC2012 --out /data/imagenet-shards --parts 16
    python launch/prep.py --converter image_folder --source /data/photos --out /data/photo-shards --parts 4
    python launch/prep.py --out /data/imagenet-shards --status

Options that are not listed here, such as --short-side 320, are the converter's: `python data_prep/imagenet.py --help`
shows them. What is written is byte for byte what one machine would write. The part that finishes last checks all shards
and writes the index. A job that meets its time limit is requeued and goes on; so does the same command, given again.
Run it on the login node; --source and --out must lie on file systems that the compute nodes share.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # so that what a bare Python lacks is told by crate_dist
from crate_dist.arguments import Parser, positive
from crate_dist.config import ClusterSection
from crate_dist.data.index import ShardError
from crate_dist.errors import UserError
from crate_dist.launching.showing import show
from crate_dist.launching.site import Site, load_site
from crate_dist.prep.job import PrepJob
from crate_dist.prep.parts import progress
from crate_dist.run.snapshot import CLONE
from crate_dist.slurm.executor import Executor
from crate_dist.slurm.options import parse_minutes
from crate_dist.slurm.queue import NoAnswer, QueuedJob, is_here, my_jobs
from crate_dist.slurm.verdict import UNSET, beyond_partition, qos_beyond
from crate_dist.terminal import complain, labelled

CONVERTERS = ("imagenet", "imagenet21k", "image_folder")
"""Programs of data_prep that take --part."""
_WARNED_S = 120
_REQUEUES = 1000
_TIME_MIN = 720
_JOBS = ".slurm"


def main(argv: list[str] | None = None) -> int:
    """Checks, submits, says how to watch; or says how far the parts are. Returns the exit status."""
    parser = _parser()
    arguments, converters_own = parser.parse_known_args(argv)
    try:
        out = arguments.out.expanduser().absolute()
        if arguments.status:
            return _status(out)
        if arguments.source is None or arguments.parts is None:
            parser.error("--source and --parts are needed, or --status")
        if any(word.split("=")[0] == "--part" for word in converters_own):
            parser.error("--part is given to each job by --parts")
        return _start(arguments, _command(arguments, out, converters_own), out)
    except (UserError, OSError) as error:
        complain(error)
        return 1


def _start(arguments: argparse.Namespace, command: Sequence[str], out: Path) -> int:
    """Has the converter look at the source, and submits; returns the exit status."""
    jobs = [PrepJob([*command, "--part", f"{number}/{arguments.parts}"]) for number in range(1, arguments.parts + 1)]
    site = load_site()
    executor = _executor(arguments, out, site)
    if beyond := _beyond_partition(arguments, site):
        raise UserError(beyond)
    if not arguments.dry_run and not shutil.which("sbatch"):
        raise UserError(
            "no sbatch on this machine: run this on a login node of the cluster, or `module load slurm` there; "
            f"without SLURM, give each machine its part: {shlex.join(jobs[0].command)}"
        )
    if not arguments.dry_run and (queued := _queued(out)):
        array = queued[0].name.partition("_")[0]
        raise UserError(
            f"{len(queued)} job(s) of this conversion are in the queue, {queued[0].name} is {queued[0].state.lower()}: "
            f"wait for them (--out {shlex.quote(str(out))} --status says how far they are), or `scancel {array}` first"
        )
    # What is wrong is said here, where it costs a look at the source, and not by all jobs after hours in the queue.
    looked = subprocess.run([*jobs[0].command, "--dry-run"], stdout=subprocess.PIPE, text=True)
    print(looked.stdout if arguments.dry_run else looked.stdout.removesuffix("dry run: nothing was written\n"), end="")
    if looked.returncode:
        return looked.returncode
    if arguments.dry_run:
        print(f"each of {arguments.parts} jobs: {shlex.join(jobs[0].command)}\n\n{executor.script(len(jobs))}")
        return 0
    executor.folder.parent.mkdir(parents=True, exist_ok=True)
    submitted = executor.send(jobs)
    job_id = submitted[0].job_id.partition("_")[0]
    show(labelled("job", f"{job_id}, {arguments.parts} parts"))
    show(labelled("to watch", f"python launch/prep.py --out {shlex.quote(str(out))} --status"))
    show(labelled("", f"tail -F {shlex.quote(str(submitted[0].paths.stdout))}"))
    show(labelled("to cancel", f"scancel {job_id}"))
    return 0


def _status(out: Path) -> int:
    """Says how far the parts are, and which jobs wait; returns 0 when all is done."""
    try:
        waiting = [job for job in _queued(out, patiently=False) if not job.runs]
    except NoAnswer as error:
        print(f"SLURM does not say which jobs wait: {error}", file=sys.stderr)
        waiting = []
    try:
        lines, whole = progress(out)
    except ShardError as error:
        if not waiting:
            raise
        lines, whole = [str(error)], False
    if waiting:
        others = f", and {len(waiting) - 1} more" if len(waiting) > 1 else ""
        lines.append(f"job {waiting[0].name} waits{others}: {waiting[0].why}")
    print("\n".join(lines))
    return 0 if whole else 1


def _queued(out: Path, patiently: bool = True) -> list[QueuedJob]:
    """Lists the jobs of a conversion that wait or run. Raises NoAnswer."""
    sent = {path.name for path in (out / _JOBS).glob("*")}
    return [job for job in my_jobs(patiently) if {job.number, job.name} & sent] if sent and is_here() else []


def _beyond_partition(arguments: argparse.Namespace, site: Site) -> str:
    """Says what the partition has too little of for these jobs; "": of nothing, or a qos may allow it."""
    minutes, origin = _time(arguments, site)
    asked = {key: getattr(arguments, key) or getattr(site, key) or UNSET for key in ("partition", "qos")}
    settings = {key: (value, "") for key, value in asked.items()}
    settings |= {"nodes": ("1", "--parts"), "time_min": (str(minutes), origin)}
    beyond = beyond_partition(ClusterSection(nodes=1, time_min=minutes), settings)
    if beyond and (note := qos_beyond(settings)):
        print(f"note: {beyond}; {note}")
        return ""
    remedy = "the jobs would wait for ever; --time LIMIT asks for less, and a job that is ended goes on"
    return f"{beyond}: {remedy}" if beyond else ""


def _time(arguments: argparse.Namespace, site: Site) -> tuple[int, str]:
    """Returns the time limit of each job in minutes, and where it is from."""
    if arguments.time_min:
        return arguments.time_min, "--time"
    return (site.time, site.origins.get("time", "the site file")) if site.time else (_TIME_MIN, "default")


def _command(arguments: argparse.Namespace, out: Path, converters_own: Sequence[str]) -> list[str]:
    program = str(CLONE / "data_prep" / f"{arguments.converter}.py")
    source = arguments.source.expanduser().absolute()
    command = [sys.executable, program, "--source", str(source), "--out", str(out), *converters_own]
    if not any(word.split("=")[0] == "--workers" for word in converters_own):
        command += ["--workers", str(arguments.cpus_per_task)]
    return command


def _executor(arguments: argparse.Namespace, out: Path, site: Site) -> Executor:
    if misread := re.search(r"[%\\]", str(out)):
        raise UserError(f"SLURM and submitit would read the {misread[0]} in --out {out} as a pattern; give another")
    executor = Executor(out / _JOBS / "%j", max_num_timeout=_REQUEUES, python=shlex.quote(sys.executable))
    wanted = {
        "job_name": f"prep-{out.name}",
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": arguments.cpus_per_task,
        "mem": f"{arguments.mem_gb}GB" if arguments.mem_gb else None,
        "time": _time(arguments, site)[0],
        "signal_delay_s": _WARNED_S,
        "array_parallelism": arguments.at_once or arguments.parts,
        **{key: getattr(arguments, key) or getattr(site, key) for key in ("partition", "account", "qos")},
        "exclude": site.exclude,
        "constraint": arguments.constraint,
        "setup": [*site.setup_lines(), *arguments.setup],
        "srun_args": [f"--cpus-per-task={arguments.cpus_per_task}"],  # which srun no longer takes over from sbatch
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True},
    }
    # submitit's own wckey would be refused where accounting knows no such key.
    executor.update_parameters(**{key: value for key, value in wanted.items() if value is not None}, wckey=None)
    return executor


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.passes_on = True
    parser.add_argument("--converter", choices=CONVERTERS, default="imagenet", help="program of data_prep [imagenet]")
    parser.add_argument("--source", type=Path, metavar="DIR", help="what is converted, as the converter takes it")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument("--parts", type=positive, metavar="N", help="jobs, each on one node")
    parser.add_argument("--at-once", type=positive, metavar="N", help="jobs that may run at the same time [all]")
    parser.add_argument(
        "--status", action="store_true", help="say which part is where; the status is 0 when all is done"
    )
    parser.add_argument("--dry-run", action="store_true", help="look at the source, show the script, submit nothing")
    cluster = parser.add_argument_group("what each job asks for")
    cluster.add_argument("--cpus-per-task", type=positive, default=16, metavar="N", help="and workers [16]")
    cluster.add_argument("--mem-gb", type=positive, metavar="GB", help="memory [the partition's default]")
    cluster.add_argument(
        "--time",
        type=parse_minutes,
        metavar="LIMIT",
        dest="time_min",
        help="as 12:00:00 [the site file's, else 12 hours]",
    )
    for name in ("partition", "account", "qos"):
        cluster.add_argument(f"--{name}", metavar="NAME", help="[the site file's, as launch/slurm.py has it]")
    cluster.add_argument("--constraint", metavar="FEATURES")
    cluster.add_argument(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help="shell line before the job; may come several times",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
