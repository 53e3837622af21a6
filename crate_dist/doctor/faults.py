"""The stage "faults": a run that hangs, one whose rank is killed, one that finds the device full."""

from __future__ import annotations

import os
import pickletools
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from crate_dist.doctor.run import descendants
from crate_dist.doctor.shards import trial_shards
from crate_dist.doctor.stage import Finding, Setting
from crate_dist.doctor.trial import Trial
from crate_dist.run.checkpoints import published_step
from crate_dist.run.exit_status import TRY_AGAIN

_LEFT_FREE = 2e9
_FULL_S = 60.0
_ENDS_WITHIN_S = 45.0  # a run that hangs: the watchdog waits for 8 s, and again for the stacks


def examine(setting: Setting) -> Iterator[Finding]:
    """Stops a rank, kills one, and fills the device; the run has to say what happened, and to go on."""
    shards = trial_shards(setting)
    if setting.device == "cpu":
        yield Finding("a device that is full", "not tried", note="needs a GPU")
    else:
        yield _full(Trial(setting, shards, setting.scratch / "full", ranks=1))
    # Two ranks where there are two devices, or none: of a single one it is the loader that is stopped.
    trial = Trial(setting, shards, setting.scratch, ranks=2 if setting.small else None)
    steps = f"train.max_steps={_steps(trial)}"
    short = "safety.hang_timeout_s=8", "log.whitebox_every_steps=0", "train.compile=false", "train.epochs=20", steps
    for disturb in (_hang, _kill):
        yield from disturb(trial, short)
        if not trial.ended(0):
            return


def _steps(trial: Trial) -> int:
    """The steps of the run: a GPU takes some dozen of them while a checkpoint is written."""
    return 30 if trial.setting.small else 80


def _until_saved(trial: Trial, after: int) -> int:
    """Waits until a step after that one is saved and the next ones are taken; returns the saved one.

    What stands then is what the run goes on from; 0: the run has ended before, or the time is over.
    """
    while (saved := published_step(trial.run.checkpoints) or 0) <= after or trial.last_step <= saved:
        if trial.ended(0.02) or trial.setting.left_s < 5:
            return 0
    return saved


def _hang(trial: Trial, settings: tuple[str, ...]) -> Iterator[Finding]:
    """Stops the last rank, or the loader of the only one, and looks at what the watchdog leaves."""
    trial.start(*settings)
    if not _until_saved(trial, after=0):
        yield trial.unfinished("training begins") or Finding(
            "training begins", f"step {trial.last_step}", expected="steps are taken", passed=False, note=trial.why()
        )
        return
    last = trial.rank_processes()[-1]
    stopped = [last] if trial.ranks > 1 else descendants(last)
    began = time.monotonic()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    status = trial.wait()
    took, said = time.monotonic() - began, trial.output()
    if took < _ENDS_WITHIN_S and (over := trial.unfinished("a run that hangs")):
        yield over
        return
    ended = status == TRY_AGAIN
    what = "a rank that is stopped" if trial.ranks > 1 else "a loader that is stopped"
    yield Finding(what, took, "s to the end of the run", "ended by the watchdog", ended, "" if ended else trial.why())
    stacks = "no progress for" in said and "most recent call first" in said
    yield Finding("stacks of every thread in its log", "yes" if stacks else "no", "", "yes", stacks)
    if trial.ranks > 1:
        named = f"rank {trial.ranks - 1}" in (re.findall(r"behind the others: (.*)", said) or [""])[-1]
        yield Finding("the rank behind is named", "yes" if named else "no", expected="yes", passed=named)
    folder = trial.run.log_file(0).with_name("flight-recorder")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    records = {path.name: path.stat().st_size for path in files}
    nccl = trial.setting.device == "cpu" or any(map(_has_nccl, files))
    yield Finding(
        "records of the last collectives",
        len(records),
        "files",
        "at least one, with entries of NCCL on GPUs",
        passed=bool(records) and min(records.values()) > 0 and nccl,
        facts=dict(records),
    )


def _kill(trial: Trial, settings: tuple[str, ...]) -> Iterator[Finding]:
    """Goes on with the run, kills a rank, goes on again to the end."""
    first = published_step(trial.run.checkpoints) or 0
    trial.start(*settings)
    if not _until_saved(trial, after=first):
        name = "goes on after a hang"
        yield trial.unfinished(name) or Finding(
            name, f"step {trial.last_step}", expected="yes", passed=False, note=trial.why()
        )
        return
    os.kill(trial.rank_processes()[0], signal.SIGKILL)
    status = trial.wait()
    yield Finding("a rank that is killed", f"status {status}", expected="ends the run", passed=bool(status))
    second = published_step(trial.run.checkpoints) or 0
    trial.start(*settings)
    finished = trial.wait() == 0
    if over := trial.unfinished("goes on after each, to the end"):
        yield over
        return
    resumed = [int(step) for step in re.findall(r"resumed from .*step-0*(\d+)", trial.output())]
    whole = [step for step, _ in trial.metrics("train/loss")] == list(range(1, _steps(trial) + 1))
    yield Finding(
        "goes on after each, to the end",
        f"from step {', '.join(map(str, dict.fromkeys(resumed)))}; {'' if whole else 'not '}each step once",
        expected=f"from step {first} and {second}, each step once",
        passed=finished and whole and list(dict.fromkeys(resumed)) == [first, second],
        note="" if finished else trial.why(),
    )


def _has_nccl(record: Path) -> bool:
    """Tells whether a flight recorder's pickle has a collective of NCCL, "nccl:all_reduce"; nothing in it is run."""
    try:
        found = [value for _, value, _ in pickletools.genops(record.read_bytes()) if isinstance(value, str)]
    except ValueError:
        return False
    return any(value.startswith("nccl:") for value in found)


def _full(trial: Trial) -> Finding:
    """Takes up nearly all of the device's memory, as another program may, and starts a run beside it."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(max(int(free - _LEFT_FREE), 0), dtype=torch.uint8, device="cuda")
    trial.start("train.micro_batch=256", "train.compile=false")
    if not trial.ended(min(_FULL_S, trial.setting.left_s - 3)):
        trial.stop(signal.SIGKILL)
    del taken
    torch.cuda.empty_cache()  # the runs behind it need the device
    said = re.search(r"error: (out of memory: .*)", trial.output())
    named = said is not None and "micro-batch of 256" in said[1] and "train.micro_batch=" in said[1]
    return Finding(
        "a device that is full",
        "named" if named else "not named",
        expected="the error names the micro-batch that fits",
        passed=named,
        note=said[1] if said else trial.why(),
    )
