"""Train CRATE, the white-box transformer, on WebDataset shards with DeepSpeed ZeRO-2 across a SLURM cluster.

    model = crate_dist.load("runs/crate_base")      a run, a checkpoint, or a file of weights; see docs/api.md
    model.predict("photo.jpg")
    model.intermediates(model.preprocess("photo.jpg"))

What is offered here is imported when it is first asked for: programs that launch know nothing of torch.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crate_dist.api.fit import RunFailed, fit
    from crate_dist.api.model import Model, create, load
    from crate_dist.api.preprocess import Preprocess
    from crate_dist.api.shards import Shards

__all__ = ["Model", "Preprocess", "RunFailed", "Shards", "create", "fit", "load"]
__version__ = "0.1.0"
_HOMES = {"fit": "fit", "RunFailed": "fit", "Preprocess": "preprocess", "Shards": "shards"}
"""Modules of `api` by what is in them; the rest is in `model`."""
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


if not TYPE_CHECKING:  # which would let any name pass

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.api.{_HOMES.get(name, 'model')}"), name)

    def __dir__():
        return sorted({*globals(), *__all__})


sys.excepthook = _show_missing_package
