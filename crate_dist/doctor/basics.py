"""Looks at what a rank needs of its node, without starting anything: the part of an examination that takes no time.

Each check is a function that returns a Finding, with what would do in its note. Imports no torch.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
import sysconfig
import tempfile
import time
from pathlib import Path

from crate_dist.doctor.machine import compiler, memory_limit, total_memory
from crate_dist.doctor.stage import Finding

SHM_PER_RANK = 256e6
"""Bytes of /dev/shm for each rank beside another: NCCL's buffers between the GPUs of a node are some of 10 MB each."""
MEMORY_PER_RANK = 12e9
"""Bytes of the node's memory for each rank: torch with CUDA 4 GB, a loader worker 0.5 GB, pinned batches 1 to 2 GB."""


def shared_memory(ranks: int, enough: float = 1.0) -> Finding:
    """Looks at the room in /dev/shm; containers have 64 MB by default. enough: share of what is needed that passes"""
    need = enough * SHM_PER_RANK * ranks if ranks > 1 else 0.0
    try:
        free = float(shutil.disk_usage("/dev/shm").free)
    except OSError:
        free = 0.0
    note = "NCCL needs it between GPUs: give the container --ipc=host or --shm-size=8g, or set NCCL_SHM_DISABLE=1"
    well = free >= need
    return Finding("/dev/shm", free / 1e9, "GB free", f"{need / 1e9:.1f} GB or more", well, "" if well else note)


def room(what: str, folder: Path, need_gb: float, remedy: str) -> Finding:
    """Looks whether a folder, or what is there of the way to it, can be written and has room."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    expected = f"{need_gb:g} GB or more, and it can be written"
    try:
        usage, status = shutil.disk_usage(there), os.statvfs(there)
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(65536))
            file.flush()
    except OSError as error:
        return Finding(what, error.strerror or "cannot be written", "", expected, passed=False, note=remedy)
    inodes = status.f_files == 0 or status.f_favail > 1000
    well = usage.free >= need_gb * 1e9 and inodes
    note = remedy if inodes else f"it has no room for more files (inodes); {remedy}"
    return Finding(what, usage.free / 1e9, "GB free", expected, well, "" if well else note)


def cores(ranks: int, workers: int, binding: bool) -> Finding:
    """Looks whether each rank has a core beside those of its loader workers. binding: without them it is no good"""
    there = len(os.sched_getaffinity(0))
    need = ranks * (workers + 1)
    note = (
        f"{ranks} rank(s) with data.workers={workers} each share them: ask for --cpus-per-task {workers + 1}, or give "
        f"--set data.workers={max(there // ranks - 1, 1)}"
    )
    well = there >= need
    return Finding(
        "cores", there, "may be used", f"{need} or more", well if binding or well else None, "" if well else note
    )


def memory(ranks: int) -> Finding:
    """Looks at the memory that the node, or the job's share of it, has for its ranks."""
    there, need = memory_limit() or total_memory(), ranks * MEMORY_PER_RANK
    note = "ask for more with --mem, or give less to the loader with --set data.workers=N"
    return Finding(
        "memory", there / 1e9, "GB", f"{need / 1e9:.0f} GB or more", there >= need, "" if there >= need else note
    )


def c_compiler(needed: bool) -> Finding:
    """Looks for the compiler and the headers with which Triton builds its launchers. needed: something compiles here"""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    missing = [what for what, there in (("gcc", compiler()), ("Python.h", header.is_file())) if not there]
    note = "without them nothing is compiled, and training is slower: install gcc and python3-dev, or module load gcc"
    value = f"{', '.join(missing)} missing" if missing else f"{Path(compiler()).name} and Python.h"
    passed = False if missing and needed else None if missing else True
    return Finding("C compiler", value, "", "gcc and Python.h", passed, note if missing else "")


def host_name() -> Finding:
    """Looks what this node's name means here; nodes of a job find each other by the names that SLURM has for them."""
    name = socket.gethostname()
    try:
        found = {info[4][0] for info in socket.getaddrinfo(name, None)}
    except OSError:
        note = "a job on this node alone needs none; on several, each has to resolve the name of the first"
        return Finding("host name", "does not resolve", note=note)
    loopback = all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)
    value = "a loopback address, which gloo and NCCL pass over" if loopback else "an address of the network"
    return Finding("host name", value, passed=True)


def clock(folder: Path, at_most_s: float = 5.0) -> Finding:
    """Holds this node's clock against that of the file system, by the time of a file written now."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    with tempfile.NamedTemporaryFile(dir=there) as file:
        before = time.time()
        file.write(b"now")
        file.flush()
        os.fsync(file.fileno())
        skew = os.stat(file.name).st_mtime - (before + time.time()) / 2
    well = abs(skew) < at_most_s and time.time() > 1.7e9
    note = "the node or the file server has a wrong clock: have it set (chrony, ntp); records of runs would lie"
    return Finding(
        "clock, to that of the file system", skew, "s", f"within {at_most_s:g} s", well, "" if well else note
    )
