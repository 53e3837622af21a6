"""Describes the machine in the lines that a bug report needs. Imports no torch, and asks no network.

Left out is what names somebody: users, hosts, paths below a home folder, and the environment but for what decides how
torch, NCCL and CUDA work.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import crate_dist
from crate_dist.doctor.nvidia import driver_version, query_gpus

CLONE = Path(crate_dist.__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "deepspeed", "webdataset", "numpy", "pillow", "simplejpeg", "lion-pytorch")
_TOLD_VARIABLES = re.compile(
    r"(CUDA_VISIBLE_DEVICES|CUDA_DEVICE_\w+|NCCL_(?!.*(KEY|TOKEN))\w+|GLOO_\w+|OMP_NUM_THREADS|TORCH_NCCL_\w+|"
    r"PYTORCH_\w*ALLOC_CONF|TORCHINDUCTOR_\w+|DS_ACCELERATOR|SLURM_(JOB_NUM_NODES|NTASKS|GPUS_ON_NODE|CPUS_PER_TASK))"
)
_NAMES_SOMEBODY = re.compile(r"(DIR|FILE|PATH|COMM_ID|HOSTID|HOST)$")


def describe() -> dict[str, str]:
    """Returns lines of text by their names, in the order of a report."""
    memory = total_memory()
    limit = memory_limit()
    lines = {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "crate-dist": f"{crate_dist.__version__}{_commit()}",
        "Python": f"{platform.python_version()}, {' '.join(platform.libc_ver())}, {_compiler_version()}",
        "packages": ", ".join(f"{name} {found}" for name in PACKAGES if (found := version(name))),
        "CUDA": f"{torch_cuda() or 'none'} of torch's build, driver {driver_version() or 'none'}, {_nccl()}",
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}, {_processor()}",
        "cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} may be used{_quota()}",
        "memory": f"{memory / 1e9:.0f} GB" + (f", limited to {limit / 1e9:.0f} GB" if limit else ""),
        "/dev/shm": disk_text(Path("/dev/shm")),
        "folders": f"here {disk_text(Path.cwd())}; temporary {disk_text(Path(os.environ.get('TMPDIR', '/tmp')))}",
    }
    for gpu in query_gpus():
        facts = [gpu.get("name", "?"), f"{gpu.get('memory.total', '?')} MiB"]
        names = {"compute_cap": "capability", "mig.mode.current": "MIG", "power.limit": "watts"}
        facts += [f"{names[key]} {gpu[key]}" for key in names if key in gpu]
        lines[f"GPU {gpu.get('index', '?')}"] = ", ".join(facts)
    told = {name: value for name, value in sorted(os.environ.items()) if _TOLD_VARIABLES.fullmatch(name)}
    if told:
        lines["environment"] = " ".join(f"{name}={_told(name, value)}" for name, value in told.items())
    return lines


def version(package: str) -> str:
    """Returns the version of an installed package, "" where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def torch_cuda() -> str:
    """Returns the CUDA version that torch was built with, "" for a CPU build, without importing it."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.origin:
        return ""
    with contextlib.suppress(OSError):
        said = re.search(
            r"^cuda\b[^=]*= *'([\d.]+)'", Path(found.origin).with_name("version.py").read_text(), re.MULTILINE
        )
        return said[1] if said else ""
    return ""


def compiler() -> str:
    """Returns the path of the C compiler that Triton and torch would call, "" where there is none."""
    return next(
        (path for name in (os.environ.get("CC"), "gcc", "clang", "cc") if name and (path := shutil.which(name))), ""
    )


def total_memory() -> int:
    """Returns the bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_limit() -> int:
    """Returns the bytes that this process's control group may use, where that is less than all; 0: no limit."""
    for path in _group_files("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            if (limit := int(path.read_text())) < total_memory():
                return limit
    return 0


def disk_text(folder: Path) -> str:
    """Says how much room a folder has."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return f"cannot be used: {error.strerror}"
    return f"{usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB free"


def _group_files(second: str, first: str) -> list[Path]:
    """Returns the files of this process's control group, innermost first, in the layouts of cgroup 2 and 1."""
    root, inner = Path("/sys/fs/cgroup"), ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        inner = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    folders = [root / inner, *(root / inner).parents] if inner else [root]
    return [folder / second for folder in folders if folder.is_relative_to(root)] + [root / first]


def _quota() -> str:
    for path in _group_files("cpu.max", "cpu/cpu.max"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = path.read_text().split()
            return f", limited to the time of {int(quota) / int(period):.1f}"
    return ""


def _commit() -> str:
    """Returns the commit of the clone, and whether it was changed since."""
    if not (CLONE / ".git").exists():
        return ", not a clone"
    commit = _said("git", "-C", str(CLONE), "rev-parse", "--short=10", "HEAD")
    changed = _said("git", "-C", str(CLONE), "status", "--porcelain", "--untracked-files=no")
    return (f", commit {commit}" if commit else "") + (", changed since" if changed else "")


def _nccl() -> str:
    found = [dist for dist in importlib.metadata.distributions() if str(dist.name).startswith("nvidia-nccl")]
    return f"NCCL {found[0].version}" if found else "no NCCL package"


def _processor() -> str:
    with contextlib.suppress(OSError):
        said = re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return " ".join(said[1].split()) if said else "unknown processor"
    return "unknown processor"


def _compiler_version() -> str:
    return (_said(compiler(), "--version").splitlines() or [compiler()])[0] if compiler() else "no C compiler"


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def without_folders(text: str) -> str:
    """Returns a text in which paths have lost their folders, but for the system's own."""
    return re.sub(r"(?<![\w:/.…-])/(?!(?:dev|etc|proc|sys|usr)/)(?:[^\s/:'\",]+/)+", "…/", text)


def _told(name: str, value: str) -> str:
    """Returns a variable's value, or that it is set: a path, a host or an address may name somebody."""
    names = _NAMES_SOMEBODY.search(name) or re.search(r"[/~]|[A-Za-z][\w-]*\.[A-Za-z]|\d+\.\d+\.\d+|::", value)
    return "set" if names else value
