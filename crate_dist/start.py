"""Runs a module, as `python -m` does, with the code that this file belongs to, whatever else is installed.

    python RUN/code/DIGEST/crate_dist/start.py -m crate_dist.train --run-dir RUN

The launchers start ranks so, from the snapshot of run/snapshot.py. Neither the folder that it is called from, nor
PYTHONPATH, nor an editable install leads the ranks, or the processes that they start, to other code.
"""

from __future__ import annotations

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main() -> None:
    """Looks at the code, then becomes the module that the arguments name."""
    # Before any import: Python has put this file's own folder first, whose modules have names of their own.
    sys.path[:] = [ROOT, *(path for path in sys.path if path != os.path.join(ROOT, "crate_dist"))]
    os.environ["PYTHONSAFEPATH"] = "1"  # for processes that this one starts, from whatever folder
    if os.pathsep not in ROOT:
        os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
    import runpy
    from pathlib import Path

    import crate_dist
    from crate_dist.run.exit_status import NEEDS_A_PERSON
    from crate_dist.run.snapshot import CodeChanged, check_unchanged

    loaded = os.path.dirname(os.path.dirname(os.path.abspath(crate_dist.__file__)))
    rank = os.environ.get("SLURM_PROCID", os.environ.get("RANK", "0"))
    try:
        if loaded != ROOT:
            raise CodeChanged(
                f"the run was started with the code in {ROOT}, and Python loads that in {loaded} instead: a .pth file "
                "or a sitecustomize.py imports crate_dist before anything else; uninstall that one"
            )
        if rank == "0":
            check_unchanged(Path(ROOT))
    except CodeChanged as error:
        print(f"crate-dist fault: rank {rank}: {error}", flush=True)  # noqa: T201  (batch.sh looks for such a line)
        sys.exit(NEEDS_A_PERSON)
    del sys.argv[: sys.argv.index("-m") + 1]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
