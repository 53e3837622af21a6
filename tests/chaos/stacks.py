"""The stacks of every thread of every process, left behind by a trial that gives up."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

SIGNAL = signal.SIGUSR1


def answer_with_stacks(path: Path) -> None:
    """Has this process, and those that are forked from it, append the Python stacks of all threads at SIGNAL."""
    faulthandler.register(SIGNAL, path.open("a"), all_threads=True)


def family(pids: Iterable[int]) -> list[int]:
    """These processes and all that descend from them, those that are left."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid for pid in pids if pid in parents]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid and child not in found]
    return found


def leave_stacks(pids: Iterable[int], folder: Path) -> Path:
    """Writes a file for each process and its descendants, what the kernel and gdb know; Python's own as they answer.

    Gives the folder. Processes that nobody told to `answer_with_stacks` are not asked: SIGNAL would end them.
    """
    folder = folder / "stacks"
    folder.mkdir(parents=True, exist_ok=True)
    for pid in family(pids):
        there, said = Path(f"/proc/{pid}"), []
        with contextlib.suppress(OSError):
            if int(_field(there / "status", "SigCgt"), 16) >> (SIGNAL - 1) & 1:
                os.kill(pid, SIGNAL)
                time.sleep(0.2)
            said += [(there / "cmdline").read_text().replace("\0", " "), (there / "status").read_text()]
            said += [f"{task.name} waits in {(task / 'wchan').read_text()}" for task in (there / "task").iterdir()]
        if shutil.which("gdb"):
            command = ["gdb", "-batch", "-p", str(pid), "-ex", "thread apply all bt"]
            with contextlib.suppress(subprocess.TimeoutExpired):
                said.append(subprocess.run(command, capture_output=True, text=True, timeout=60).stdout)
        (folder / str(pid)).write_text("\n".join(said))
    return folder


def _field(path: Path, name: str) -> str:
    return next(line.split()[1] for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
