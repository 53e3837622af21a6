"""The process of one stage: examines, and appends each finding to a file that the runner reads."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from crate_dist.distributed import exit_at_once
from crate_dist.doctor.nvidia import driver_version
from crate_dist.doctor.stage import Finding, Setting
from crate_dist.doctor.start import unusable_device
from crate_dist.files import AppendedFile


def main() -> int:
    """Runs the stage that the only argument describes, as run.py wrote it; returns the exit status."""
    order = json.loads(sys.argv[1])
    device = order["device"]
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the stage would take a GPU that it sees
    scratch = Path(order["scratch"])
    scratch.mkdir(parents=True)
    reference = order["reference"] and Path(order["reference"])
    setting = Setting(device, device == "cpu", scratch, order["ends_at"], reference)
    findings = AppendedFile(Path(order["findings"]))
    if device == "cuda" and (problem := _without_gpu()):
        findings.append(json.dumps(asdict(problem)).encode() + b"\n")
        return 0
    for finding in importlib.import_module(order["module"]).examine(setting):
        findings.append(json.dumps(asdict(finding), default=float).encode() + b"\n")
    return 0


def _without_gpu() -> Finding | None:
    """Looks whether there is the GPU that --device cuda asks for; None: there is."""
    import torch

    if torch.cuda.is_available():
        return None
    note = unusable_device() or "there is no GPU here, or it is hidden; --device cpu examines the rest"
    return Finding("driver", driver_version() or "none", "", "a GPU, for --device cuda", passed=False, note=note)


if __name__ == "__main__":
    exit_at_once(main)
