"""What the driver says of the GPUs of this machine, without CUDA and without torch; empty where there are none."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

GPU_FIELDS = (
    *("index", "name", "memory.total", "memory.used", "compute_cap", "mig.mode.current", "pstate"),
    *("ecc.errors.uncorrected.volatile.total", "temperature.gpu", "power.limit", "pci.bus_id"),
)
_NOTHING = ("", "[N/A]", "N/A", "[Not Supported]", "[Unknown Error]")


def smi(*arguments: str, timeout_s: float = 20) -> str:
    """Returns what nvidia-smi prints, "" where it does not work."""
    if not (program := shutil.which("nvidia-smi")):
        return ""
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=timeout_s)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def query_gpus() -> list[dict[str, str]]:
    """Returns GPU_FIELDS of each GPU, those alone that the driver knows."""
    said = smi(f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits")
    rows = csv.reader(said.splitlines(), skipinitialspace=True)
    return [{k: v for k, v in zip(GPU_FIELDS, row, strict=False) if v not in _NOTHING} for row in rows]


def device_files() -> list[Path]:
    """Returns /dev/nvidia0 and the like, of which a container may have any."""
    return sorted(path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdecimal())


def driver_version() -> str:
    """Returns the version of the kernel's driver, "" where there is none."""
    try:
        said = Path("/proc/driver/nvidia/version").read_text(errors="replace")
    except OSError:
        return ""
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", said)
    return found[1] if found else ""


_OLDEST_DRIVER = {"11": (450, 80), "12": (525, 60), "13": (580, 65)}
"""CUDA's major version -> the oldest driver that runs all its minor versions, as NVIDIA's release notes have it."""


def oldest_driver(cuda: str) -> str:
    """Returns the oldest driver that runs programs built with this CUDA, "" where that is not known."""
    known = _OLDEST_DRIVER.get(cuda.partition(".")[0])
    return ".".join(map(str, known)) if known else ""


def is_older(version: str, than: str) -> bool:
    """Compares versions of drivers, number by number."""
    first, second = ([int(part) for part in re.findall(r"\d+", text)] for text in (version, than))
    return first[: len(second)] < second


def xid_errors() -> list[str]:
    """Returns the last lines of the kernel's log in which the driver reports a fault, where it may be read."""
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if "NVRM: Xid" in line][-5:]


_BROKEN_XIDS = (48, 64, 74, 79, 94, 95, 119, 120, 140)
"""Of those that the driver reports, the device's own faults: memory, links, bus, its controller. Others, such as 13 and
31, are mostly of the programs that ran there."""
_RECENT_S = 3600.0


def gpu_faults(timeout_s: float = 2.0) -> list[str]:
    """Says what the driver knows of broken GPUs among those that this process may see; [] also where it does not say.

    Errors in memory that were not corrected since the driver was loaded, memory that waits for a reset to be replaced
    or cannot be, and faults of the last hour in the kernel's log.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    among = [f"--id={chosen}"] if chosen and "MIG" not in chosen else []
    form = "--format=csv,noheader,nounits"
    ecc = smi("--query-gpu=pci.bus_id,ecc.errors.uncorrected.volatile.total", form, *among, timeout_s=timeout_s)
    remapped = smi(
        "--query-remapped-rows=gpu_bus_id,remapped_rows.pending,remapped_rows.failure",
        form,
        *among,
        timeout_s=timeout_s,
    )
    gpus, faults = [], []
    for bus, errors, *_ in csv.reader(ecc.splitlines(), skipinitialspace=True):
        gpus.append(bus.lower())
        if errors.isdecimal() and int(errors):
            faults.append(f"GPU {bus}: {errors} errors in its memory that were not corrected")
    for bus, *states in csv.reader(remapped.splitlines(), skipinitialspace=True):
        for state, what in zip(states, ("waits for a reset to be replaced", "could not be replaced"), strict=False):
            if state.lower() in ("1", "yes"):
                faults.append(f"GPU {bus}: broken memory {what}")
    return faults + [line for line in xid_errors() if _is_recent_and_broken(line, gpus)]


def _is_recent_and_broken(line: str, gpus: list[str]) -> bool:
    """Tells whether a line of the kernel's log reports a fault of one of these devices within the last hour."""
    found = re.match(r"\[ *(\d+)\.\d+\].*Xid \(PCI:([0-9a-fA-F:]+)\): (\d+)", line)
    if not found or int(found[3]) not in _BROKEN_XIDS or time.monotonic() - int(found[1]) > _RECENT_S:
        return False
    return any(found[2].lower() in bus for bus in gpus)
