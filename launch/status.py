"""Shows how runs are doing, and lets you read their logs, stop them and go on with them.

    python launch/status.py                          all runs under runs/
    python launch/status.py runs/crate_large         one of them; RUN may also be its name or its SLURM job
    python launch/status.py runs/sweep --watch       an array: a folder with run folders in it; anew every few seconds
    python launch/status.py list                     what runs there are
    python launch/status.py results runs/sweep       runs beside each other, the best first: top-1, losses, settings
    python launch/status.py logs RUN [--rank N] [--follow]
    python launch/status.py stop RUN [--wait]        saves first, and is not started again until you say so
    python launch/status.py resume RUN [--nodes M]   by its own recipe, with the resources that it had, or others

It works for every way to start a run, from any machine that sees the run's folder, and with or without SLURM. Only
`stop` and `resume` change anything. Exit statuses: 0 done, 10 running, 11 waiting in the queue, 12 stopped, 20 stuck,
21 failed (of several runs the highest, so that from 20 on somebody should look); 1 for a mistake of the command.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone's code, whichever else is installed
from crate_dist.arguments import Parser, positive, whole_number, with_examples
from crate_dist.errors import UserError
from crate_dist.launching.showing import show
from crate_dist.launching.sweep import results_table
from crate_dist.run.dashboard import address
from crate_dist.run.folder import RunFolder
from crate_dist.terminal import complain
from crate_dist.watching.finding import find_runs, runs_root
from crate_dist.watching.logs import follow, show_logs
from crate_dist.watching.report import report
from crate_dist.watching.resuming import resume
from crate_dist.watching.runs import EXIT_STATUS, STUCK_AFTER_S, Queue, Run, look
from crate_dist.watching.stopping import stop
from crate_dist.watching.table import as_list, as_table, in_full

_OTHER_NAMES = {
    **dict.fromkeys(("kill", "cancel", "scancel", "end", "abort"), "stop"),
    **dict.fromkeys(("tail", "cat", "output"), "logs"),
    **dict.fromkeys(("start", "restart", "continue", "requeue"), "resume"),
    **dict.fromkeys(("ls", "show"), "list"),
}
"""What other programs call the commands."""


def main(argv: list[str] | None = None) -> int:
    """Does what the command line says; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    commands: dict[str, Callable[[list[str]], int]] = {
        "logs": _logs,
        "stop": _stop,
        "resume": _resume,
        "list": _list,
        "results": _results,
    }
    try:
        _check_is_command(words, commands)
        return commands[words[0]](words[1:]) if words and words[0] in commands else _status(words)
    except KeyboardInterrupt:
        return 130
    except (UserError, OSError) as error:
        complain(error)
        return 1


def _check_is_command(words: Sequence[str], commands: Collection[str]) -> None:
    """Raises UserError: what stands before the runs is like a command, and neither one nor a run."""
    if len(words) < 2 or words[0].startswith("-") or words[0] in commands or Path(words[0]).exists():
        return
    near = _OTHER_NAMES.get(words[0]) or next(iter(difflib.get_close_matches(words[0], commands, n=1)), "")
    if near and not (runs_root() / words[0]).exists():
        raise UserError(f"{words[0]}: no such command, and no such run; did you mean `status.py {near}`?")


def _status(words: list[str]) -> int:
    parser = _parser(__doc__, "", "RUN", "folder or name of a run, of several runs, or a SLURM job [all under runs/]")
    parser.add_argument(
        "--watch", nargs="?", type=positive, const=5, metavar="SECONDS", help="anew every 5 s, until over"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object for each run, a line each")
    parser.add_argument(
        "--stuck-after",
        type=positive,
        default=int(STUCK_AFTER_S / 60),
        metavar="MINUTES",
        help="a run that works, and has made no step, evaluation or save for so long, is stuck [%(default)s]",
    )
    arguments = parser.parse_args(words)
    while True:
        runs = _look(arguments.runs, 60 * arguments.stuck_after)
        if arguments.json:
            text = "\n".join(json.dumps(run.to_json(), allow_nan=False) for run in runs)
        else:
            text = _one(runs[0], with_address=not arguments.watch) if len(runs) == 1 else as_table(runs)
        if arguments.watch and sys.stdout.isatty() and not arguments.json:
            text = f"\033[H\033[2J{time.strftime('%H:%M:%S')}  every {arguments.watch} s, until Ctrl-C\n\n{text}"
        show(text)
        if not arguments.watch or all(run.is_over for run in runs):
            return max(EXIT_STATUS[run.state] for run in runs)
        time.sleep(arguments.watch)


def _one(run: Run, with_address: bool) -> str:
    """Returns the report on a run that is done, how it goes with any other. with_address: of its curves"""
    if run.state == "done":
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # in_full names what cannot be read
            return report(RunFolder(run.run))
    curves = f"\n  {'curves':<12}{address(RunFolder(run.run))}" if with_address else ""
    return in_full(run) + curves


def _list(words: list[str]) -> int:
    parser = _parser(
        "Lists what runs there are, and what they are.", "list", "RUN", "some of them, or a folder of some"
    )
    show(as_list(_look(parser.parse_args(words).runs, STUCK_AFTER_S, disk=True)))
    return 0


def _results(words: list[str]) -> int:
    parser = _parser(
        "Compares runs, the best one first: top-1, losses, and the settings in which they differ.",
        *("results", "RUN", "some of them, or a folder of some, as of a sweep"),
    )
    show(results_table(find_runs(parser.parse_args(words).runs)))
    return 0


def _look(words: Sequence[str], stuck_after_s: float, disk: bool = False) -> list[Run]:
    paths, queue = find_runs(words), Queue.asked()
    return [look(path, queue, stuck_after_s, disk or len(paths) == 1) for path in paths]


def _logs(words: list[str]) -> int:
    parser = _parser(
        "Shows the sentence that matters in a run's logs, and their end.", "logs", "RUN", "folder, name or SLURM job"
    )
    parser.add_argument(
        "--rank", type=whole_number(0), metavar="N", help="that rank's log [the batch script's and rank 0's]"
    )
    parser.add_argument("--lines", type=positive, default=30, metavar="N", help="lines of the end [%(default)s]")
    parser.add_argument("--follow", action="store_true", help="go on as the log grows, through restarts, until Ctrl-C")
    arguments = parser.parse_args(words)
    paths = _some(parser, arguments.runs)
    if arguments.follow and len(paths) > 1:
        parser.error(f"--follow follows one run, and these are {len(paths)}")
    for path in paths:
        shown = show_logs(path, Queue.asked(), arguments.rank, arguments.lines)
        if arguments.follow:
            follow(path, arguments.rank, shown)
    return 0


def _stop(words: list[str]) -> int:
    parser = _parser(
        "Tells a run to save and to end. Nothing starts it again before you do. A job that waits is cancelled.\n"
        "In contrast to scancel it takes the time that a save takes, and in contrast to a signal it is not requeued.",
        *("stop", "RUN", "folder, name or SLURM job; of an array, all its runs"),
    )
    parser.add_argument("--wait", action="store_true", help="until it is saved, and say at which step")
    arguments = parser.parse_args(words)
    return stop(_some(parser, arguments.runs), arguments.wait)


def _resume(words: list[str]) -> int:
    parser = _parser(
        "Starts a run again, as it was started before: as a SLURM job, or on this machine. It goes on from its newest\n"
        "checkpoint. All other options are launch/slurm.py's or launch/local.py's, and win over what it had:\n\n"
        "    status.py resume runs/crate_base --nodes 2 --time 12:00:00",
        *("resume", "RUN", "folder, name or SLURM job; of an array, a job for each run"),
    )
    arguments, others = parser.parse_known_args(words)
    return resume(_some(parser, arguments.runs), others)


def _parser(description: str | None, command: str, metavar: str, what: str) -> argparse.ArgumentParser:
    program = f"{Path(__file__).name} {command}".strip()
    parser = Parser(prog=program, description=with_examples(description, program, __doc__))
    parser.add_argument("runs", nargs="*", metavar=metavar, help=what)
    return parser


def _some(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[Path]:
    if not words:
        parser.error("which run? `status.py` shows those that there are")
    return find_runs(words)


if __name__ == "__main__":
    sys.exit(main())
