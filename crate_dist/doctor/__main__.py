"""Examines this machine, and crate-dist on it, and says what is wrong and what would do.

    python -m crate_dist.doctor                         what a start needs, in under a minute
    python -m crate_dist.doctor --full --json doctor.json
    srun python -m crate_dist.doctor --full --only between

The full examination trains, resumes, breaks and measures a CRATE on data that it makes: no shards, no network and
nothing else on the device is needed. Each stage is a process of its own with its own limit; what was found before it
crashed is kept. The report at the end is what belongs into a bug report: it names no user, and no secret.

The exit status is the number of checks that failed, 100 at most; 0: all is well.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from crate_dist.arguments import Parser, positive
from crate_dist.doctor.machine import describe
from crate_dist.doctor.report import Progress, as_text, end_of_log, failed_checks, write_json
from crate_dist.doctor.run import BETWEEN, QUICK, STAGES, Examined, Plan, Stage, limits, run_stages
from crate_dist.world import detect_world

QUICK_S = 60
FULL_S = 540
_MOST = 100
_DEFAULT_JSON = Path("runs", "doctor", "doctor.json")
_REPORT_S = 3.0  # of the budget, for ending what is left and for the report


def main(argv: list[str] | None = None) -> int:
    """Examines what the command line names; returns the exit status."""
    arguments, world = _parser().parse_args(argv), detect_world()
    names = arguments.only or ([stage.name for stage in STAGES] if arguments.full else [QUICK.name])
    stages = [stage for stage in STAGES if stage.name in names]
    beyond_quick = set(names) != {QUICK.name}
    budget = max((arguments.budget or (FULL_S if beyond_quick else QUICK_S)) - _REPORT_S, 1)
    if world.world_size > 1:  # first what all ranks do together; the others have no part in the rest
        stages.sort(key=lambda stage: stage is not BETWEEN)
    if not world.is_main:
        budget = limits(stages, budget)[0]
        stages = [stage for stage in stages if stage is BETWEEN]
    if arguments.dry_run:
        for stage, limit in zip(stages, limits(stages, budget), strict=True):
            print(f"{stage.name:<12}{limit:5.0f} s  {stage.purpose}")
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)
    where = arguments.json or (_DEFAULT_JSON if beyond_quick else None)
    try:
        with tempfile.TemporaryDirectory(prefix="crate-doctor-", dir=arguments.scratch) as scratch:
            return _examine(arguments, stages, budget, Path(scratch), where if world.is_main else None)
    except OSError as error:
        print(f"error: {error}; another --json or --scratch may do", file=sys.stderr)
        return 1


def _examine(
    arguments: argparse.Namespace, stages: list[Stage], budget: float, scratch: Path, where: Path | None
) -> int:
    """Runs the stages, and tells and writes what comes of it; returns the exit status."""
    is_main, about, progress = detect_world().is_main, describe(), Progress(len(stages))
    logs = where.with_name(f"{where.stem}-logs") if where else scratch / "logs"
    logs.mkdir(parents=True, exist_ok=True)

    def changed(examined: Sequence[Examined]) -> None:
        if where is not None:
            write_json(where, about, examined)
        if is_main:  # last: the terminal may be gone
            progress(examined)

    changed([])
    examined = run_stages(stages, budget, Plan(logs, scratch, arguments.device, arguments.reference), changed)
    if is_main:
        print(as_text(about, examined, where))
        if where is None:  # the logs go with the scratch
            print(*(end_of_log(one.log) for one in examined if one.state == "failed" and one.log), sep="\n", end="")
    if any(one.state == "interrupted" for one in examined):
        return 130
    return min(failed_checks(examined), _MOST)


def _parser() -> Parser:
    names = [stage.name for stage in STAGES]
    parser = Parser(
        prog="python -m crate_dist.doctor",
        description=__doc__,
        epilog="stages:\n" + "\n".join(f"  {stage.name:<12}{stage.purpose}" for stage in STAGES),
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="what a start needs, in under a minute [this]")
    which.add_argument("--full", action="store_true", help="all stages below")
    parser.add_argument(
        "--only", nargs="+", choices=names, default=[], metavar="STAGE", help="of the stages below these alone"
    )
    parser.add_argument(
        "--budget", type=positive, metavar="S", help=f"seconds for all together [{FULL_S}; of quick alone {QUICK_S}]"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help=f"write each finding there, and the logs beside it [{_DEFAULT_JSON}; of quick alone none]",
    )
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="[a GPU where there is one]")
    parser.add_argument(
        "--reference", type=Path, metavar="DIR", help="a checkout of the published code, to be compared with"
    )
    parser.add_argument(
        "--scratch", type=Path, metavar="DIR", help="folder for what is thrown away [the temporary one]"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the stages with their limits, and run nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
