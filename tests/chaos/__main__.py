"""Every fault of the matrix, and kill -9 at random moments, each in a run of its own: a table in Markdown.

    python -m tests.chaos                      all of it
    python -m tests.chaos --seed 17            the same random moments again
    python -m tests.chaos --only SIGSTOP       the cases with that in their name, a regular expression

A run that ended as the undisturbed one did is removed; what is left of another is kept, with the error.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from tests.chaos.reference import undisturbed
from tests.chaos.trial import Trial, clear
from tests.chaos.trials import Case, cases, killed_at_random


def main(argv: list[str] | None = None) -> int:
    """Prints a line of the table for each case; gives 1 when a run did not survive."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of the moments [any]")
    parser.add_argument("--moments", type=int, default=50, metavar="N", help="random ones [%(default)s]")
    parser.add_argument("--only", metavar="REGEX", default="", help="cases in whose name this is found")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where runs that did not survive are kept")
    arguments = parser.parse_args(argv)
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=arguments.folder))
    _say(f"seed {arguments.seed}; what fails is kept in {folder}\n")
    reference, takes_s = undisturbed(folder)
    rng = random.Random(arguments.seed)
    seeds = [rng.randrange(10**9) for _ in range(arguments.moments)]
    moments = [
        Case(f"kill -9 at random moment {number}", partial(killed_at_random, seed=seed, about_s=takes_s))
        for number, seed in enumerate(seeds, 1)
    ]
    chosen = [case for case in [*cases(), *moments] if re.search(arguments.only, case.name)]
    failed = _try_all(chosen, reference)
    _say(f"\n{len(chosen) - failed} of {len(chosen)} runs ended as the undisturbed one did")
    return 1 if failed else 0


def _try_all(chosen: Iterable[Case], reference: Trial) -> int:
    _say("| fault | what happened | started from step | the end |\n|---|---|---|---|")
    failed = 0
    for number, case in enumerate(chosen):
        began = time.monotonic()
        trial = Trial(reference.folder.with_name(f"{number:03d}"), reference.arguments, reference)
        try:
            case.disturb(trial)
            if not trial.finished:
                trial.finish()
            trial.check()
            end = "the same"
        except Exception as error:
            failed += 1
            end = f"**{type(error).__name__}**, see {trial.folder}"
            (trial.folder / "error").write_text(traceback.format_exc())
        starts = ", ".join(map(str, trial.restarts())) if trial.run.record_file.exists() else ""
        _say(f"| {case.name} | {'; '.join(trial.said)} | {starts} | {end} |")
        sys.stderr.write(f"{case.name}: {end}, {time.monotonic() - began:.0f} s\n")
        if end == "the same":
            clear(trial)
    return failed


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
