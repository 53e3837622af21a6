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
from contextlib import ExitStack
from pathlib import Path

from crate_dist.arguments import positive
from crate_dist.doctor.machine import describe
from crate_dist.doctor.report import Progress, as_text, failed_checks, write_json
from crate_dist.doctor.run import BETWEEN, QUICK, STAGES, Examined, Plan, Stage, limits, run_stages
from crate_dist.world import detect_world

QUICK_S = 60
FULL_S = 540
_MOST = 100
_REPORT_S = 3.0  # of the budget, for ending what is left and for the report


def main(argv: list[str] | None = None) -> int:
    """Examines what the command line names; returns the exit status."""
    arguments = _parser().parse_args(argv)
    stages, budget = _stages(arguments), arguments.budget or (FULL_S if arguments.full else QUICK_S)
    if arguments.dry_run:
        for stage, limit in zip(stages, limits(stages, budget - _REPORT_S), strict=True):
            print(f"{stage.name:<12}{limit:5.0f} s  {stage.purpose}")
        return 0
    world = detect_world()
    if world.world_size > 1 and not world.is_main:
        stages = [stage for stage in stages if stage is BETWEEN]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ExitStack() as stack:
        try:
            scratch = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="crate-doctor-", dir=arguments.scratch))
            )
            where: Path | None = arguments.json
            logs = scratch / "logs" if where is None or not world.is_main else where.with_name(f"{where.stem}-logs")
            logs.mkdir(parents=True, exist_ok=True)
            about = describe()
            if where is not None and world.is_main:
                write_json(where, about, [])
        except OSError as error:
            print(
                f"error: cannot write {error.filename}: {error.strerror}; give another --json or --scratch",
                file=sys.stderr,
            )
            return 1
        progress = Progress(len(stages))

        def changed(examined: Sequence[Examined]) -> None:
            if world.is_main:
                progress(examined)
                if where is not None:
                    write_json(where, about, examined)

        plan = Plan(logs, scratch, arguments.device, arguments.reference)
        examined = run_stages(stages, max(budget - _REPORT_S, 1), plan, changed)
        if world.is_main:
            print(as_text(about, examined, where))
    if any(one.state == "interrupted" for one in examined):
        return 130
    return min(failed_checks(examined), _MOST)


def _stages(arguments: argparse.Namespace) -> list[Stage]:
    if arguments.only:
        return [stage for stage in STAGES if stage.name in arguments.only]
    if not arguments.full:
        return [QUICK]
    if detect_world().world_size > 1:  # the other ranks have nothing else to do: first what all do together
        return [BETWEEN, *(stage for stage in STAGES if stage is not BETWEEN)]
    return list(STAGES)


def _parser() -> argparse.ArgumentParser:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(
        prog="python -m crate_dist.doctor",
        description=__doc__,
        epilog="stages:\n" + "\n".join(f"  {stage.name:<12}{stage.purpose}" for stage in STAGES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="what a start needs, in under a minute [this]")
    which.add_argument("--full", action="store_true", help="all stages below")
    parser.add_argument(
        "--only", nargs="+", choices=names, default=[], metavar="STAGE", help="of the stages below these alone"
    )
    parser.add_argument(
        "--budget", type=positive, metavar="S", help=f"seconds for everything [{QUICK_S}; with --full {FULL_S}]"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the findings there after each, and the logs beside it"
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
