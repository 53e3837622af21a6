"""The data path, measured: images/s of loaders side by side, conversion, and what re-encoding costs.

    python benchmarks/data.py --source DIR_OF_CLASS_FOLDERS [--images N] [--rounds R] [--workers 1 2] [--json FILE]

All loaders take the same images in turns, round after round, so that a busy machine is busy for each of them; the
tables have medians and quartiles. Beside them stand what other users of the machine disturb less: the fastest round,
and the CPU time of all processes per image.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import measuring  # isort: skip
import contestants
import numpy as np
import psutil
import torch
from contestants import SIZE
from measuring import Cost, cost, print_table, psnr_db
from PIL import Image
from published import class_folders

from crate_dist.data.index import checksum
from crate_dist.data.transforms import TrainTransform, sample_rng
from crate_dist.prep.images import ImageOptions, transcode

REPO = Path(__file__).resolve().parents[1]
FOR_SPEED = ImageOptions(short_side=320, quality=90)
"""The documented default for speed."""
IMAGE_OPTIONS = [None, *(ImageOptions(side, quality) for side in (320, 256) for quality in (95, 90))]
BATCH = 50
WARM_BATCHES = 6
BASELINE = "ImageFolder + Pillow, float32 (baseline)"
OURS, SMALL = "crate-dist, original images", "crate-dist, re-encoded"
PACKAGES = ("torch", "pillow", "simplejpeg", "webdataset", "timm", "torchvision", "litdata", "mosaicml-streaming")
UNITS = ("ms", "ms_best", "cpu_ms")

Row = dict[str, Any]


def main() -> int:
    """Measures and prints. Returns the exit status."""
    parser = measuring.parser(__doc__, measuring.JSON)
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help="DIR/<class>/<image>")
    parser.add_argument("--images", type=int, default=600, metavar="N", help="images per measurement [%(default)s]")
    parser.add_argument("--rounds", type=int, default=7, metavar="R", help="measurements of each [%(default)s]")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N", help="loader processes [1 2]")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="crate-bench-") as temporary:
        result = {"machine": measuring.machine(*PACKAGES, "ffcv"), **measure(arguments, Path(temporary))}
    measuring.write_json(arguments.json, result)
    report(result, arguments)
    return 0


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Converts, then runs every measurement `rounds` times in turns."""
    source, images = arguments.source, arguments.images
    files = [path for path, _ in class_folders(source)[1]]
    conversion = convert(source, work, len(files))
    copies = -(-(images + (WARM_BATCHES + 8) * BATCH) // len(files))
    loaders: dict[str, tuple[contestants.Contestant, Path, Callable[..., object] | None]] = {
        BASELINE: (contestants.pillow_folder, source, None),
        "timm": (contestants.timm_folder, source, lambda *_: next(contestants.timm_folder(source, 2, 0))),
        "webdataset, shuffle(1000) + Pillow": (contestants.webdataset, work / "original", None),
        "litdata + Pillow": (contestants.litdata_stream, work / "litdata", contestants.write_litdata),
        "mosaicml-streaming + Pillow": (contestants.mosaic_stream, work / "mosaic", contestants.write_mosaic),
        "FFCV, original size": (contestants.ffcv_loader, work / "ffcv", contestants.write_ffcv),
        "FFCV, re-encoded": (
            contestants.ffcv_loader,
            work / "ffcv-re-encoded",
            partial(contestants.write_ffcv, image_options=FOR_SPEED),
        ),
        OURS: (contestants.ours, work / "original", None),
        SMALL: (contestants.ours, work / "re-encoded", None),
    }
    missing: dict[str, str] = {}
    for name, (_, place, write) in list(loaders.items()):
        try:
            taken = cost(write, source, place, copies, cpu_s=cpu_with_children_s) if write else None
        except (ImportError, RuntimeError) as error:
            missing[name] = f"not installed ({type(error).__name__}: {error})"
            del loaders[name]
        else:
            if taken and place != source:
                conversion.append(writer_row(name, taken, len(files) * copies, 1))
    torch.multiprocessing.set_start_method("fork", force=True)  # litdata's writer leaves "spawn" behind for all
    turns = {(name, 0): measured for name, measured in in_process(files).items()}
    for name, workers in itertools.product(loaders, arguments.workers):
        if workers == 1 or "+" not in name or name == BASELINE:
            turns[name, workers] = partial(through, *loaders[name][:2], workers, images)
    costs = measuring.in_turns(turns, arguments.rounds)
    return {
        "missing": missing,
        "loaders": [{"name": name, "workers": n, **summary(values)} for (name, n), values in costs.items() if n],
        "decode": [{"name": name, **summary(values)} for (name, n), values in costs.items() if not n],
        "conversion": conversion,
        "re-encoding": [re_encoding(files[:: max(1, len(files) // 200)], options) for options in IMAGE_OPTIONS],
    }


def through(make: contestants.Contestant, place: Path, workers: int, images: int) -> Cost:
    """Measures an image through a fresh loader, after it has warmed up."""
    batches = make(place, BATCH, workers)

    def take(count: int) -> None:
        for _ in range(count):
            next(batches)

    take(WARM_BATCHES)
    return cost(take, images // BATCH, count=images // BATCH * BATCH, cpu_s=cpu_of_living_s)


def in_process(files: Sequence[Path]) -> dict[str, Callable[[], Cost]]:
    """Returns what decodes and crops an image from memory, and what takes its checksum as the reader does."""
    original, small = (
        [transcode(path.read_bytes(), options)[0] for path in files] for options in (ImageOptions(), FOR_SPEED)
    )
    transform, out = TrainTransform(SIZE), np.empty((BATCH, SIZE, SIZE, 3), np.uint8)

    def pillow(data: bytes, number: int) -> None:
        np.asarray(contestants.pillow_crop(Image.open(io.BytesIO(data)).convert("RGB")))

    def ours(data: bytes, number: int) -> None:
        transform(data, sample_rng(0, 0, number), out[number % BATCH])

    def take_checksum(data: bytes, number: int) -> None:
        checksum(data)

    def measured(work: Callable[[bytes, int], None], images: Sequence[bytes]) -> Cost:
        def all_of_them() -> None:
            for number, data in enumerate(images):
                work(data, number)

        torch.set_num_threads(1)  # FFCV leaves its own number behind
        return cost(all_of_them, count=len(images))

    return {
        "Pillow, original": partial(measured, pillow, original),
        "ours, original": partial(measured, ours, original),
        "ours, re-encoded": partial(measured, ours, small),
        "checksums alone, original": partial(measured, take_checksum, original),
        "checksums alone, re-encoded": partial(measured, take_checksum, small),
    }


def convert(source: Path, work: Path, count: int) -> list[Row]:
    """Writes original/ and re-encoded/ with data_prep, and says how fast it was on 1 and on 2 processes."""
    rows = []
    speed = ["--short-side", FOR_SPEED.short_side, "--quality", FOR_SPEED.quality]
    for kind, options in (("original", []), ("re-encoded", speed)):
        for workers, out in ((1, work / kind), (2, work / f"{kind}-2")):
            command = [sys.executable, "data_prep/image_folder.py", "--source", source, "--out", out, *options]
            command += ["--workers", workers, "--shard-samples", -(-count // contestants.LANES)]
            run = partial(subprocess.run, list(map(str, command)), cwd=REPO, check=True, capture_output=True)
            rows.append(writer_row(f"data_prep {kind}", cost(run, cpu_s=cpu_with_children_s), count, workers))
    return rows


def writer_row(name: str, taken: Cost, count: int, workers: int) -> Row:
    """Returns one line of the table of writers; start-up counts."""
    return {
        "name": name,
        "workers": workers,
        "images": count,
        "images_per_s": count / taken.wall_s,
        "images_per_cpu_s": count / max(taken.cpu_s, 1e-9),
        "cpu_use": taken.cpu_s / taken.wall_s / workers,
    }


def re_encoding(files: Sequence[Path], options: ImageOptions | None) -> Row:
    """Returns bytes per image, and the PSNR of crops: fast against exact resize, re-encoded against original image."""
    transform = TrainTransform(SIZE, flip=0.0)
    size, sizes, fast, kept = (SIZE, SIZE), [], [], []
    for number, path in enumerate(files):
        original = path.read_bytes()
        data = transcode(original, options or ImageOptions())[0]
        sizes.append(len(data))
        image = Image.open(io.BytesIO(data)).convert("RGB")
        box, _, _ = transform.draw(image.size, random.Random(number))
        exact = np.asarray(image.crop(box).resize(size, Image.Resampling.BICUBIC))
        fast.append(psnr_db(transform(data, random.Random(number)), exact))
        if options:
            whole = Image.open(io.BytesIO(original)).convert("RGB")
            x, y = whole.width / image.width, whole.height / image.height
            there = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
            here = np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=box))
            kept.append(psnr_db(here, np.asarray(whole.resize(size, Image.Resampling.BICUBIC, box=there))))
    return {
        "short_side": options.short_side if options else None,
        "quality": options.quality if options else None,
        "bytes": statistics.mean(sizes),
        "fast_psnr_db": [float(np.percentile(fast, p)) for p in (50, 5, 0)],
        "kept_psnr_db": [float(np.percentile(kept, p)) for p in (50, 5)] if kept else None,
    }


def cpu_with_children_s() -> float:
    """Returns the CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def cpu_of_living_s() -> float:
    """Returns the CPU seconds of this process and its living children so far."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return float(sum(sum(process.cpu_times()[:2]) for process in processes))


def summary(costs: Sequence[Cost]) -> Row:
    """Returns median, quartiles and least of the ms per image, and the median CPU ms per image."""
    clock, cpu = ([1e3 * seconds for seconds in column] for column in zip(*costs, strict=True))
    low, middle, high = measuring.quartiles(clock)
    return {"ms": middle, "ms_quartiles": [low, high], "ms_best": min(clock), "cpu_ms": statistics.median(cpu)}


def report(result: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Prints the tables as Markdown."""
    rows, decode = result["loaders"], {row["name"]: row for row in result["decode"]}
    by_name = {(row["name"], row["workers"]): row for row in rows}
    about = measuring.in_words(result["machine"])
    print(f"{about}; {arguments.rounds} rounds of {arguments.images} images, batch {BATCH}\n")

    base = by_name.get((BASELINE, 1), rows[0])
    table: list[Sequence[object]] = []
    for row in rows:
        low, high = (1e3 / ms for ms in reversed(row["ms_quartiles"]))
        speed = f"{1e3 / row['ms']:.0f} ({low:.0f} to {high:.0f})"
        ratio, best, cpu = (base[unit] / row[unit] for unit in UNITS)
        table.append([row["name"], row["workers"], speed, ratio, 1e3 / row["ms_best"], best, row["cpu_ms"], cpu])
    table += [[name, "", why, *[""] * 5] for name, why in result["missing"].items()]
    head = ["loader", "workers", "images/s: median (quartiles)", "ratio", "fastest", "ratio", "CPU ms/image", "ratio"]
    print_table(head, table, "s d s .2f .0f .2f .2f .2f")

    first = result["decode"][0]["ms"]
    table = [[row["name"], 1e3 / row["ms"], first / row["ms"], row["cpu_ms"]] for row in result["decode"]]
    head = ["in one process, from memory to uint8", "images/s", "ratio", "CPU ms/image"]
    print_table(head, table, "s .0f .2f .3f")

    table = []
    for kind, name in (("original", OURS), ("re-encoded", SMALL)):
        if loader := by_name.get((name, 1)):
            shares = (f"{1 - decode[f'ours, {kind}'][unit] / loader[unit]:.1%}" for unit in UNITS)
            table.append([f"loader overhead: {name}", *shares])
    for kind in ("original", "re-encoded"):
        alone, whole = decode[f"checksums alone, {kind}"], decode[f"ours, {kind}"]
        table.append([f"checksums against decoding: {kind}", *(f"{alone[unit] / whole[unit]:.2%}" for unit in UNITS)])
    for (name, workers), row in by_name.items():
        if workers > 1 and (one := by_name.get((name, 1))):
            speedups = (f"{one[unit] / row[unit]:.2f}" for unit in UNITS[:2])
            table.append([f"1 to {workers} workers: {name}", *speedups, ""])
    print_table(["", "median", "fastest round", "CPU time"], table)

    keys = ("name", "workers", "images_per_s", "images_per_cpu_s", "cpu_use")
    head = ["writer", "processes", "images/s", "images per CPU second", "CPU use"]
    print_table(head, ([row[key] for key in keys] for row in result["conversion"]), "s d .0f .0f .0%")

    table = []
    for row in result["re-encoding"]:
        psnr = (", ".join(f"{v:.1f}" for v in row[key] or []) for key in ("fast_psnr_db", "kept_psnr_db"))
        options = (row[key] or "as it is" for key in ("short_side", "quality"))
        table.append([*options, row["bytes"], *(text and f"{text} dB" for text in psnr)])
    fast = "fast against Pillow: median, 5 %, least"
    print_table(["short side", "quality", "bytes/image", fast, "kept: median, 5 %"], table, "d d ,.0f s s")


if __name__ == "__main__":
    sys.exit(main())
