"""Train CRATE, the white-box transformer, on WebDataset shards with DeepSpeed ZeRO-2 across a SLURM cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

__version__ = "0.1.0"
_CLONE = str(Path(__file__).resolve().parents[1])
_show_traceback = sys.excepthook


def _show_missing_package(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Says in a line what a program of this project misses, instead of the traceback; the exit status is 1 as well."""
    last = trace
    while last and last.tb_next:
        last = last.tb_next
    importer = last.tb_frame.f_globals.get("__file__", "") if last else ""
    program = getattr(sys.modules["__main__"], "__file__", None) or importer
    missing = str(error.name) if isinstance(error, ModuleNotFoundError) else __name__
    if missing.startswith(__name__) or not program.startswith(_CLONE) or "-packages" in importer:
        _show_traceback(kind, error, trace)  # a bug, somebody else's program, or a package that is not whole
        return
    python = f"{sys.executable} ({sys.version.partition(' ')[0]})"
    print(  # noqa: T201
        f"error: {missing} is not installed for {python}; in {_CLONE}, `make setup` installs everything and "
        "`source .venv/bin/activate` chooses it; or `pip install -e .` there installs into another environment",
        file=sys.stderr,
    )


sys.excepthook = _show_missing_package
