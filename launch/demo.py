"""The whole mission once, small: real images to shards to a trained CRATE to an exact evaluation.

    make demo

Writes scikit-learn's 1,797 handwritten digits as a tree of PNG files, converts them to shards with
data_prep/image_folder.py, trains recipe `demo` on two local ranks with ZeRO-2 through launch/local.py, and evaluates
the result. The ranks take a GPU each, or the CPU where there is none; with one GPU there is one rank. Everything lies
in runs/; started again, it finds its work done and only evaluates.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # so that what a bare Python lacks is told by crate_dist
import crate_dist  # isort: skip
import numpy as np
from PIL import Image

from crate_dist.arguments import Parser
from crate_dist.launching.ranks import visible_gpus
from crate_dist.run.dashboard import address
from crate_dist.run.folder import RunFolder

CLONE = Path(crate_dist.__file__).parents[1]
FOLDER = Path("runs")
IMAGES, SHARDS, RUN = FOLDER / "demo-images", FOLDER / "demo-shards", FOLDER / "demo"


def main() -> int:
    """Runs the commands of the README one after the other, showing each; returns the status of the first to fail."""
    parser = Parser(description=__doc__)
    parser.parse_args()
    began = time.monotonic()
    if not IMAGES.is_dir():
        print(f"writing the digits of scikit-learn as images under {IMAGES}", flush=True)
        write_digits(CLONE / IMAGES)
    commands = [
        ["data_prep/image_folder.py", "--source", IMAGES, "--out", SHARDS, "--val-fraction", "0.2", "--workers", "2"],
        ["launch/local.py", "--arch", "demo", "--ranks", str(ranks()), "--data", SHARDS, "--run-dir", RUN],
        ["-m", "crate_dist.evaluate", RUN],
    ]
    for command in commands:
        line = ["python", *map(str, command)]
        print(f"\n$ {shlex.join(line)}", flush=True)
        status = subprocess.run([sys.executable, *line[1:]], cwd=CLONE).returncode
        if status:
            return status
    report(CLONE / RUN, time.monotonic() - began)
    return 0


def ranks() -> int:
    """Returns the ranks to train on: two, where there is not one GPU alone, which is then said."""
    if visible_gpus() != 1:
        return 2
    print("this machine has one GPU, and each rank takes one: training on one rank, not two", flush=True)
    return 1


def write_digits(folder: Path) -> None:
    """Writes a folder per digit and a PNG of 32 x 32 pixels per image, under the final name when all are written."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    beside = folder.with_name(folder.name + ".tmp")
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = beside / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
        image.resize((32, 32), Image.Resampling.BICUBIC).save(path)
    beside.replace(folder)


def report(run: Path, seconds: float) -> None:
    """Prints the accuracy over time, from metrics.jsonl, and what to type next."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    print("\n  step   top-1     top-5")
    for line in lines:
        if "val/top1" in line:
            print(f"{line['step']:6d}  {line['val/top1']:5.2f} %  {line['val/top5']:6.2f} %")
    print(
        f"\ndone in {seconds:.0f} s\n"
        f"to see the curves:  .venv/bin/tensorboard --logdir {FOLDER}\n"
        f"                    {address(RunFolder(run))}\n"
        "to do it again:     make clean && make demo"
    )


if __name__ == "__main__":
    sys.exit(main())
