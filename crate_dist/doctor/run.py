"""Runs the stages of an examination one after the other, each as a process of its own that ends within its limit.

Imports no torch: what a broken driver does to a stage, it does to that stage alone. The stage at work and all that it
has started, whatever group or session they are in, are this process's descendants, and are ended with it; by the
kernel, should this process be killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from crate_dist.doctor.machine import without_folders
from crate_dist.doctor.stage import Finding
from crate_dist.files import whole_lines
from crate_dist.launching.ranks import ending_with_parent
from crate_dist.world import VARIABLES

LEAST_S = 2.0
"""A stage that would get less than this is not begun: it takes longer to import torch."""
_PR_SET_CHILD_SUBREAPER = 36
_MATTERS = ("Error", "error:", "Exception", "Fatal", "fault:", "Killed", "terminate called")


@dataclass(frozen=True)
class Stage:
    """A stage: its name for --only and of its module (with _ for -), its share of the budget, what it is for."""

    name: str
    share: float
    purpose: str

    @property
    def module(self) -> str:
        """The module whose `examine` it is."""
        return f"crate_dist.doctor.{self.name.replace('-', '_')}"


QUICK = Stage("quick", 40, "what a start needs: versions, driver, compiler, disk, network, memory of the device")
BETWEEN = Stage("between", 50, "several GPUs, or several nodes under srun: all-reduce per link, gloo, clocks")
STAGES = (
    QUICK,
    BETWEEN,
    Stage("ceilings", 20, "what the device can do at most: copies, large products, the model's own products"),
    Stage("compile", 115, "seconds of compiling, cold and warm, and the number of graphs; those behind find it done"),
    Stage("correct", 75, "logits and every gradient against fp64 on the CPU, in every precision and mode"),
    Stage("waits", 25, "how often and how long a step waits for the device, and the device for the step"),
    Stage("ranks", 25, "the step of one rank of many, over a process group that only pretends"),
    Stage("end-to-end", 115, "a run from images to an evaluation: compiled, stopped, resumed, exported"),
    Stage("kernels", 30, "attention backends, and ISTA with two products, with one, fused"),
    Stage("data", 35, "copies to the device, loader workers, and the share of waiting"),
    Stage("faults", 95, "a rank that hangs, one that is killed, a device that is full"),
    Stage("speed", 75, "images/s, memory and the costliest kernels, beside the published code"),
)
"""The one that has use for any time comes last: what those before do not need is its."""


@dataclass
class Examined:
    """What came of a stage. state: "to do", "running", "done", "failed", "interrupted" or "not run"."""

    stage: Stage
    state: str = "to do"
    limit_s: float = 0.0
    took_s: float = 0.0
    log: Path | None = None
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """How a stage is to be run; `device` and `reference` as in Setting, "auto" for a device that torch is to find.

    logs: the folder of the stages' logs and findings; scratch: the folder in which each stage gets its own
    """

    logs: Path
    scratch: Path
    device: str = "auto"
    reference: Path | None = None


def limits(stages: Sequence[Stage], budget_s: float) -> list[float]:
    """Gives each stage its share of the seconds that are left; what one does not need goes to those behind it."""
    whole = sum(stage.share for stage in stages)
    return [budget_s * stage.share / whole for stage in stages]


def run_stages(
    stages: Sequence[Stage], budget_s: float, plan: Plan, changed: Callable[[Sequence[Examined]], None]
) -> list[Examined]:
    """Runs the stages within `budget_s` seconds in all, and calls `changed` with all of them after each finding.

    KeyboardInterrupt ends the stage at work and leaves the others; what was found until then is returned.
    """
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # who loses its parent becomes a child of this process
    ends_at = time.monotonic() + budget_s
    examined = [Examined(stage) for stage in stages]
    try:
        for number, one in enumerate(examined):
            one.limit_s = limits(stages[number:], ends_at - time.monotonic())[0]
            if one.limit_s < LEAST_S:
                one.state = "not run"
                one.findings.append(_failure("not run", f"{one.limit_s:.1f} s of the budget were left for it"))
            else:
                _run(one, plan, lambda: changed(examined))
            changed(examined)
    except KeyboardInterrupt:
        for one in examined:
            if one.state in ("running", "to do"):
                one.state = "interrupted" if one.state == "running" else "not run"
        changed(examined)
    return examined


def _run(one: Examined, plan: Plan, changed: Callable[[], None]) -> None:
    """Runs one stage to its end or its limit."""
    one.state, name = "running", one.stage.name
    one.log, told = plan.logs / f"{name}.log", plan.logs / f"{name}.findings.jsonl"
    told.unlink(missing_ok=True)
    began = time.monotonic()
    order = {
        "module": one.stage.module,
        "device": plan.device,
        "scratch": str(plan.scratch / name),
        "ends_at": began + one.limit_s,
        "reference": plan.reference and str(plan.reference.absolute()),
        "findings": str(told.absolute()),
    }
    with one.log.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-u", "-X", "faulthandler", "-m", "crate_dist.doctor.child", json.dumps(order)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(one.stage),
            start_new_session=True,  # a Ctrl-C is this process's
            preexec_fn=ending_with_parent(),
        )
    try:
        changed()
        while process.poll() is None and time.monotonic() < began + one.limit_s:
            time.sleep(0.1)
            if _read_findings(one, told):
                changed()
    finally:
        in_time = process.poll() is not None
        _end_descendants(process)
        one.took_s = time.monotonic() - began
        _read_findings(one, told)
        told.unlink(missing_ok=True)
    one.state = "done"
    if not in_time or process.returncode:
        one.state = "failed"
        how = _how(process.returncode) if in_time else f"ended at its limit of {one.limit_s:.0f} s"
        one.findings.append(_failure(f"{how} after {one.took_s:.1f} s", f"{last_line(one.log)} [{one.log.name}]"))


def _environment(stage: Stage) -> Mapping[str, str]:
    """Returns the environment of a stage's process: one rank of one, unless the ranks are what is examined."""
    # A clone that is not installed is found from any folder, also by what a stage starts.
    path = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    if stage is not BETWEEN:
        for name in (*VARIABLES, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
            environment.pop(name, None)
    return environment


def _read_findings(one: Examined, told: Path) -> bool:
    """Takes up what the stage has told since, and says whether that was anything."""
    lines = whole_lines(told)
    new = [Finding(**json.loads(line)) for line in lines[len(one.findings) :]]
    one.findings += [replace(finding, note=without_folders(finding.note)) for finding in new]
    return bool(new)


def _failure(value: str, note: str) -> Finding:
    return Finding("the stage itself", value, expected="comes to its end", passed=False, note=without_folders(note))


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"ended by signal {-status} ({signal.Signals(-status).name})"
    return f"ended by signal {-status}"


def last_line(log: Path) -> str:
    """Finds the last line of a log that says why, else the last one."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 65536))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if any(word in line for word in _MATTERS)]
    return (telling or lines or ["it said nothing"])[-1][:300]


def _end_descendants(process: subprocess.Popen[bytes]) -> None:
    """Ends all processes below this one: the stage, and what it has left behind."""
    deadline = time.monotonic() + 10
    while (found := descendants(os.getpid())) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        process.poll()
        with contextlib.suppress(ChildProcessError):  # orphans that are ours now
            while process.returncode is not None and os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)
    process.wait()


def descendants(pid: int) -> list[int]:
    """Finds all processes below `pid` in /proc, zombies included."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError, IndexError, ValueError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, ahead = [], [pid]
    while ahead:
        below = children.get(ahead.pop(), [])
        found += below
        ahead += below
    return found


def as_json(one: Examined) -> dict[str, Any]:
    """Returns what came of a stage, for the JSON."""
    return {
        "name": one.stage.name,
        "state": one.state,
        "limit_s": round(one.limit_s, 1),
        "took_s": round(one.took_s, 1),
        "log": one.log and f"{one.log.parent.name}/{one.log.name}",
        "findings": [asdict(finding) for finding in one.findings],
    }
