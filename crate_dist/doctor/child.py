"""The process of one stage: examines, and appends each finding to a file that the runner reads."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from crate_dist.distributed import exit_at_once
from crate_dist.doctor.stage import Setting
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
    for finding in importlib.import_module(order["module"]).examine(setting):
        findings.append(json.dumps(asdict(finding), default=float).encode() + b"\n")
    return 0


if __name__ == "__main__":
    exit_at_once(main)
