"""Keeps torch's records of a rank's last collectives, its flight recorders', where torchfrtrace reads them."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_DUMP_S = 1.0


def flight_recorders(backend: str, c10d: Any = torch._C._distributed_c10d) -> dict[str, Callable[..., bytes]]:
    """Returns the dumps of torch's flight recorders by the library whose collectives they hold.

    backend: of the device; nccl has a recorder of its own, and the generic one holds those of the gloo groups beside it
    """
    dumps = {"gloo": getattr(c10d, "_dump_fr_trace", None)}
    if backend == "nccl" or dumps["gloo"] is None:  # until torch 2.9 there was one recorder, of this name
        dumps[backend] = getattr(c10d, "_dump_nccl_trace", None)
    return {library: dump for library, dump in dumps.items() if dump is not None}


def keep_flight_records(folder: Path, rank: int) -> list[str]:
    """Writes a file for each library into `folder`; returns the prefixes of their names, for torchfrtrace --prefix.

    Without stacks, whose names take torch longer to find than a rank has that is about to end.
    """
    folder.mkdir(exist_ok=True)
    prefixes = []
    for library, dump in flight_recorders(dist.get_backend()).items():
        prefixes.append(f"{library}_rank_")
        # In a thread, since nccl's recorder asks the driver, which may not answer.
        args = folder / f"{prefixes[-1]}{rank}", dump
        thread = threading.Thread(target=_keep, args=args, name=f"{library}'s record", daemon=True)
        thread.start()
        thread.join(_DUMP_S)
    return prefixes


def _keep(file: Path, dump: Callable[..., bytes]) -> None:
    record = pickle.loads(dump(includeStackTraces=False))  # made by torch in this process, a moment ago
    # torch notes gloo's groups before they have a name, under which torchfrtrace then looks for them.
    unnamed = record["pg_config"].pop("", None)
    for name, desc in {tuple(entry["process_group"]) for entry in record.get("entries", ())} if unnamed else ():
        record["pg_config"][name] = {**unnamed, "name": name, "desc": desc}
    file.write_bytes(pickle.dumps(record))
