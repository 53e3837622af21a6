"""A small training run of a stage: started as anybody would start it, watched, and disturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from crate_dist.doctor.machine import CLONE
from crate_dist.doctor.run import last_line
from crate_dist.doctor.stage import Finding, Setting
from crate_dist.files import whole_lines
from crate_dist.launching.ranks import ending_with_parent, visible_gpus
from crate_dist.run.folder import RunFolder

LOCAL = CLONE / "launch" / "local.py"

_RECIPE = """
[model]
arch = "{arch}"
image_size = {size}
patch_size = {patch}
[data]
workers = {workers}
[order]
lanes = 4
window = 64
[augment]
crop_scale = [0.5, 1.0]
[optim]
name = "lion"
lr = {lr}
warmup_epochs = 1
[train]
global_batch = {batch}
micro_batch = {micro_batch}
epochs = {epochs}
[checkpoint]
every_steps = 10
[log]
every_steps = 1
eval_every_epochs = 5
whitebox_every_steps = 10
[safety]
hang_timeout_s = 120
"""


class Trial:
    """A run of crate_tiny, or in small of crate_demo, below a folder; `ranks` is what this machine has room for."""

    def __init__(self, setting: Setting, shards: Path, folder: Path, ranks: int | None = None) -> None:
        self.setting, self.shards, self.run = setting, shards, RunFolder(folder / "run")
        gpus = 0 if setting.device == "cpu" else visible_gpus()
        self.ranks = ranks or max(n for n in (1, 2, 4, 8) if n <= max(gpus, 1))
        if setting.small:
            values = {"arch": "crate_demo", "size": 32, "patch": 8, "lr": 1e-3, "batch": 16, "micro_batch": 8}
        else:
            values = {"arch": "crate_tiny", "size": 224, "patch": 16, "lr": 3e-4, "batch": 256, "micro_batch": 128}
        spare = len(os.sched_getaffinity(0)) // self.ranks - 1
        folder.mkdir(parents=True, exist_ok=True)
        self.recipe = folder / "trial.toml"
        self.recipe.write_text(
            _RECIPE.format(**values, workers=min(8, max(1, spare)), epochs=10 if setting.small else 6)
        )
        self._output = folder / "output.txt"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *overrides: str) -> None:
        """Starts the run, or goes on with it; `overrides` are values for --set."""
        program = [str(LOCAL), "--ranks", str(self.ranks)] if LOCAL.exists() else ["-m", "crate_dist.train"]
        settings = [word for text in overrides for word in ("--set", text)]
        folders = ["--config", str(self.recipe), "--data", str(self.shards), "--run-dir", str(self.run.path)]
        environment = dict(os.environ)
        if self.setting.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        # A training compiles on one core, since others run workers; here a cold start is waited for.
        cores = len(os.sched_getaffinity(0)) // self.ranks
        environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, min(8, cores))))
        with self._output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-u", *program, *folders, *settings],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                preexec_fn=ending_with_parent(),
            )

    def until_step(self, step: int) -> bool:
        """Waits until the run has reported that step; False: it has ended or the time is over."""
        while self.last_step < step:
            if self.ended(0.02) or self.setting.left_s < 5:
                return self.last_step >= step
        return True

    def ended(self, within_s: float) -> bool:
        """Waits that long for the run to end, and says whether it has."""
        assert self.process is not None
        try:
            self.process.wait(max(within_s, 0.01))
        except subprocess.TimeoutExpired:
            return False
        return True

    def wait(self) -> int | None:
        """Waits for the end as long as the stage has time; returns the exit status, None: it goes on."""
        self.ended(self.setting.left_s - 3)
        assert self.process is not None
        return self.process.returncode

    def stop(self, signum: int = signal.SIGTERM) -> None:
        """Sends the signal to the launcher."""
        assert self.process is not None
        self.process.send_signal(signum)

    def metrics(self, key: str) -> list[tuple[int, float]]:
        """Returns the steps at which metrics.jsonl has a number of this name, and the numbers, as they stand there."""
        lines: Iterable[dict[str, Any]] = map(json.loads, whole_lines(self.run.metrics))
        return [(line["step"], line[key]) for line in lines if key in line]

    @property
    def last_step(self) -> int:
        """The last step that the run has reported, 0: none."""
        return max((step for step, _ in self.metrics("train/loss")), default=0)

    def output(self) -> str:
        """Returns what all starts have printed, and the log of rank 0, so far."""
        texts = [path for path in (self._output, self.run.log_file(0)) if path.exists()]
        return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in texts)

    def why(self) -> str:
        """Returns what the run has printed of its end, for a note, and prints the last of it for the stage's log."""
        lines = [line for line in self._output.read_text(errors="replace").splitlines() if line.strip()]
        print("\n".join(lines[-60:]), flush=True)  # noqa: T201
        return last_line(self._output)

    def unfinished(self, name: str) -> Finding | None:
        """Returns the finding `name` of a run that goes on though the stage's time is over; None: it has ended."""
        if self.ended(0):
            return None
        self.why()
        return self.setting.left_out(name, f"the run was at step {self.last_step}")

    def rank_processes(self) -> list[int]:
        """Returns the process ids of the ranks, in their order, as the launcher's children."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children] if LOCAL.exists() else [self.process.pid]
