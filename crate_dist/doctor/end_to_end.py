"""The stage "end-to-end": a run from images to an evaluation, stopped by a signal in its middle."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median

from crate_dist.doctor.shards import trial_shards
from crate_dist.doctor.stage import SMALL_NOTE, Finding, Setting
from crate_dist.doctor.trial import LOCAL, Trial
from crate_dist.launching.ranks import ending_with_parent
from crate_dist.run.exit_status import STOPPED
from crate_dist.training.compiling import COMPILED

_STOP_AT = 12


def examine(setting: Setting) -> Iterator[Finding]:
    """Trains, stops, resumes, finishes and evaluates; each has to leave what it promises."""
    began = time.monotonic()
    shards = trial_shards(setting)
    yield Finding("images converted to shards", time.monotonic() - began, "s")
    trial = Trial(setting, shards, setting.scratch)
    if not LOCAL.exists():
        note = "this crate-dist is installed without its clone, so the run is one process, started by its module"
        yield Finding("launcher", "none", note=note)

    trial.start()
    began = time.monotonic()
    came = trial.until_step(_STOP_AT)
    if not came and (over := trial.unfinished("training begins")):
        yield over
        return
    yield Finding(
        "training begins", time.monotonic() - began, f"s to step {_STOP_AT}", "steps are taken", came, _why(trial, came)
    )
    if not came:
        return
    trial.stop()
    status = trial.wait()
    if over := trial.unfinished("told to stop"):
        yield over
        return
    stopped = re.search(r"stopped at step (\d+) of", trial.output())
    in_order = stopped is not None and status in (STOPPED, 128 + 15)
    yield Finding(
        "told to stop", f"status {status}", expected="it saves and ends", passed=in_order, note=_why(trial, in_order)
    )
    if stopped is None:
        return
    trial.start()
    status = trial.wait()
    if over := trial.unfinished("resumed and finished"):
        yield over
        return
    finished = status == 0 and trial.run.model("last").exists()
    at = re.search(r"resumed from .*step-0*(\d+)", trial.output())
    yield Finding(
        "resumed at the step of the stop",
        f"step {at[1] if at else 'none'}",
        expected=f"step {stopped[1]}",
        passed=at is not None and at[1] == stopped[1],
    )
    yield Finding(
        "finished, weights exported",
        f"step {trial.last_step}",
        expected="the last",
        passed=finished,
        note=_why(trial, finished),
    )
    yield from _curves(trial)
    if finished:
        yield from _evaluated(trial)


def _curves(trial: Trial) -> Iterator[Finding]:
    """Looks at what the run has written down on its way."""
    losses = trial.metrics("train/loss")
    steps, values = [step for step, _ in losses], [loss for _, loss in losses]
    whole = steps == list(range(1, trial.last_step + 1))
    yield Finding("curve across the restart", f"{len(steps)} points", expected="each step once", passed=whole)
    first, last = fmean(values[:5]), fmean(values[-5:])
    yield Finding("loss", f"{first:.3f} to {last:.3f}", expected="falls by a fifth at least", passed=last < 0.8 * first)
    zeros = [value for name in ("whitebox/zeros", "whitebox/coding_rate") for _, value in trial.metrics(name)]
    flat = [x for value in zeros for x in (value if isinstance(value, list) else [value])]
    measured = bool(flat) and all(math.isfinite(x) for x in flat)
    yield Finding("white box", f"{len(flat)} numbers", expected="some, all finite", passed=measured)
    if not trial.setting.small:
        said = compiled_seconds(trial.run.log_file(0).read_text(encoding="utf-8"))
        refused = re.search(r"torch.compile does not work here.*", trial.output())
        note = refused[0] if refused else ""
        yield Finding("model compiled", ", ".join(said) or "no", "s", "in each start", len(said) >= 2, note)
    speeds = [speed for step, speed in trial.metrics("speed/images_per_s") if step > _STOP_AT]
    waits = [share for step, share in trial.metrics("speed/data_wait_fraction") if step > _STOP_AT]
    note = SMALL_NOTE if trial.setting.small else ""
    yield Finding(
        "speed, with all that is measured", median(speeds), "images/s", "", None, note, {"ranks": trial.ranks}
    )
    yield Finding("share of waiting for data", 100 * median(waits), "%")


def compiled_seconds(log: str) -> list[str]:
    """Finds in the log of a run the seconds that compiling took, of each start that has compiled."""
    return re.findall(COMPILED.replace("%.1f", r"([\d.]+)"), log)


def _evaluated(trial: Trial) -> Iterator[Finding]:
    """Evaluates the finished run with the program that users have, and holds it against the run's own number."""
    said = trial.setting.scratch / "evaluation.json"
    command = ["-m", "crate_dist.evaluate", str(trial.run.path), "--data", str(trial.shards), "--json", str(said)]
    limit_s = max(trial.setting.left_s - 2, 1)
    try:
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=limit_s, preexec_fn=ending_with_parent()
        )
    except subprocess.TimeoutExpired:
        yield trial.setting.left_out("accuracy by crate_dist.evaluate")
        return
    own = trial.metrics("val/top1")[-1][1]
    top1 = float(json.loads(Path(said).read_text())["top1"]) if done.returncode == 0 else math.nan
    note = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:300]
    yield Finding("accuracy of the run", own, "% top-1", "above 60, by chance it were 25", own > 60)
    yield Finding("accuracy by crate_dist.evaluate", top1, "% top-1", f"{own:.4g}", abs(top1 - own) < 2, note)


def _why(trial: Trial, well: bool) -> str:
    return "" if well else trial.why()
