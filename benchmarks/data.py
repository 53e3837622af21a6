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
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # so that what a bare Python lacks is told by crate_dist
import crate_dist  # noqa: F401  isort: skip
import contestants
import numpy as np
import psutil
import torch
from PIL import Image

from crate_dist.data.index import checksum
from crate_dist.data.transforms import TrainTransform, sample_rng
from crate_dist.prep.images import ImageOptions, transcode

REPO = Path(__file__).resolve().parents[1]
FOR_SPEED = ImageOptions(short_side=320, quality=90)
"""The documented default for speed."""
IMAGE_OPTIONS = [None, *(ImageOptions(side, quality) for side in (320, 256) for quality in (95, 90))]
BATCH = 50
WARM_BATCHES = 6
PACKAGES = (
    "torch",
    "pillow",
    "simplejpeg",
    "webdataset",
    "timm",
    "torchvision",
    "litdata",
    "mosaicml-streaming",
    "ffcv",
)

Row = dict[str, Any]


def main() -> int:
    """Measures and prints. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help="DIR/<class>/<image>")
    parser.add_argument("--images", type=int, default=600, metavar="N", help="images per measurement [%(default)s]")
    parser.add_argument("--rounds", type=int, default=7, metavar="R", help="measurements of each [%(default)s]")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N", help="loader processes [1 2]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="crate-bench-") as temporary:
        result = {"machine": machine(), **measure(arguments, Path(temporary))}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(report(result, arguments))
    return 0


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Converts, then runs every measurement `rounds` times in turns."""
    source, images = arguments.source, arguments.images
    files = [path for path, _ in contestants.FolderDataset(source).files]
    conversion = convert(source, work, len(files))
    copies = -(-(images + (WARM_BATCHES + 8) * BATCH) // len(files))
    loaders: dict[str, tuple[contestants.Contestant, Path]] = {
        "ImageFolder + Pillow, float32 (baseline)": (contestants.pillow_folder, source),
        "timm": (contestants.timm_folder, source),
        "webdataset, shuffle(1000) + Pillow": (contestants.webdataset, work / "original"),
        "litdata + Pillow": (contestants.litdata_stream, work / "litdata"),
        "mosaicml-streaming + Pillow": (contestants.mosaic_stream, work / "mosaic"),
        "FFCV, original size": (contestants.ffcv_loader, work / "ffcv"),
        "FFCV, re-encoded": (contestants.ffcv_loader, work / "ffcv-re-encoded"),
        "crate-dist, original images": (contestants.ours, work / "original"),
        "crate-dist, re-encoded": (contestants.ours, work / "re-encoded"),
    }
    missing: dict[str, str] = {}
    for name, write in (
        ("FFCV, original size", lambda: contestants.write_ffcv(source, work / "ffcv", copies, 1)),
        ("FFCV, re-encoded", lambda: contestants.write_ffcv(source, work / "ffcv-re-encoded", copies, 1, FOR_SPEED)),
        ("litdata + Pillow", lambda: contestants.write_litdata(source, work / "litdata", copies, 1)),
        ("mosaicml-streaming + Pillow", lambda: contestants.write_mosaic(source, work / "mosaic", copies)),
        ("timm", lambda: next(contestants.timm_folder(source, 2, 0))),
    ):
        start, before = time.perf_counter(), sum(os.times()[:4])
        try:
            write()
        except (ImportError, RuntimeError) as error:
            missing[name] = f"not installed ({type(error).__name__}: {error})"
            del loaders[name]
            continue
        if name != "timm":
            seconds = time.perf_counter() - start
            conversion.append(writer_row(name, seconds, sum(os.times()[:4]) - before, len(files) * copies, 1))
    torch.multiprocessing.set_start_method("fork", force=True)  # litdata's writer leaves "spawn" behind for all
    raw: dict[tuple[str, int], list[tuple[float, float]]] = {}
    inside: dict[str, list[tuple[float, float]]] = {}
    steps: dict[str, Callable[[], float]] = {
        "Pillow, original": in_process(files, None, pillow=True),
        "ours, original": in_process(files, None),
        "ours, re-encoded": in_process(files, FOR_SPEED),
        "checksums alone, original": checksums(files, None),
        "checksums alone, re-encoded": checksums(files, FOR_SPEED),
    }
    for number in range(arguments.rounds):
        for step, run in steps.items():
            torch.set_num_threads(1)  # FFCV leaves its own number behind
            start, cpu = time.perf_counter(), time.process_time()
            count = run()
            inside.setdefault(step, []).append(
                ((time.perf_counter() - start) / count * 1e3, (time.process_time() - cpu) / count * 1e3)
            )
        for name, workers in itertools.product(loaders, arguments.workers):
            if workers > 1 and "+" in name and "baseline" not in name:
                continue
            print(f"round {number + 1}: {name}, {workers} worker", file=sys.stderr)
            make, place = loaders[name]
            raw.setdefault((name, workers), []).append(through(make, place, workers, images))
    return {
        "missing": missing,
        "loaders": [{"name": name, "workers": n, **quartiles(values)} for (name, n), values in raw.items()],
        "decode": [{"name": name, **quartiles(values)} for name, values in inside.items()],
        "conversion": conversion,
        "re-encoding": [re_encoding(files[:: max(1, len(files) // 200)], options) for options in IMAGE_OPTIONS],
    }


def through(make: contestants.Contestant, place: Path, workers: int, images: int) -> tuple[float, float]:
    """Milliseconds of clock and of CPU per image through a fresh loader, after it has warmed up."""
    batches = make(place, BATCH, workers)
    for _ in range(WARM_BATCHES):
        next(batches)
    start, cpu = time.perf_counter(), cpu_s()
    for _ in range(images // BATCH):
        next(batches)
    count = images // BATCH * BATCH
    result = (time.perf_counter() - start) / count * 1e3, (cpu_s() - cpu) / count * 1e3
    del batches
    return result


def in_process(files: Sequence[Path], options: ImageOptions | None, pillow: bool = False) -> Callable[[], float]:
    """A function that decodes and crops all images from memory, and returns how many."""
    images = [transcode(path.read_bytes(), options or ImageOptions())[0] for path in files]
    transform, out = (
        TrainTransform(contestants.SIZE),
        np.empty((BATCH, contestants.SIZE, contestants.SIZE, 3), np.uint8),
    )

    def run() -> float:
        for number, data in enumerate(images):
            if pillow:
                np.asarray(contestants.pillow_crop(Image.open(io.BytesIO(data)).convert("RGB")))
            else:
                transform(data, sample_rng(0, 0, number), out[number % BATCH])
        return len(images)

    return run


def checksums(files: Sequence[Path], options: ImageOptions | None) -> Callable[[], float]:
    """A function that takes the checksums of all images as the reader does, and returns how many."""
    images = [transcode(path.read_bytes(), options or ImageOptions())[0] for path in files]

    def run() -> float:
        for data in images:
            checksum(data)
        return len(images)

    return run


def convert(source: Path, work: Path, count: int) -> list[Row]:
    """Writes original/ and re-encoded/ with data_prep, and says how fast it was on 1 and on 2 processes."""
    rows = []
    speed = ["--short-side", str(FOR_SPEED.short_side), "--quality", str(FOR_SPEED.quality)]
    for name, options, workers in (
        ("original", [], 1),
        ("original-2", [], 2),
        ("re-encoded", speed, 1),
        ("re-encoded-2", speed, 2),
    ):
        command = [sys.executable, "data_prep/image_folder.py", "--source", source, "--out", work / name, *options]
        command += ["--workers", str(workers), "--shard-samples", str(-(-count // contestants.LANES))]
        start, before = time.perf_counter(), sum(os.times()[:4])
        subprocess.run([str(part) for part in command], cwd=REPO, check=True, capture_output=True)
        seconds, cpu = time.perf_counter() - start, sum(os.times()[:4]) - before
        rows.append(writer_row(f"data_prep {name.removesuffix('-2')}", seconds, cpu, count, workers))
    return rows


def writer_row(name: str, seconds: float, cpu: float, count: int, workers: int) -> Row:
    """One line of the table of writers; start-up counts."""
    return {
        "name": name,
        "workers": workers,
        "images": count,
        "images_per_s": count / seconds,
        "images_per_cpu_s": count / max(cpu, 1e-9),
        "cpu_use": cpu / seconds / workers,
    }


def re_encoding(files: Sequence[Path], options: ImageOptions | None) -> Row:
    """Bytes per image, and the PSNR of crops: fast against exact resize, re-encoded against original image."""
    transform = TrainTransform(contestants.SIZE, flip=0.0)
    size, sizes, fast, kept = (contestants.SIZE, contestants.SIZE), [], [], []
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


def psnr_db(pixels: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB; 99 for equal pictures."""
    error = float(((pixels.astype(float) - reference) ** 2).mean())
    return 10 * float(np.log10(255**2 / error)) if error else 99.0


def cpu_s() -> float:
    """CPU seconds of this process and its living children so far."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return float(sum(sum(process.cpu_times()[:2]) for process in processes))


def quartiles(values: Sequence[tuple[float, float]]) -> Row:
    """Median, quartiles and least of the ms per image, and the median CPU ms per image."""
    clock, cpu = (np.array(column) for column in zip(*values, strict=True))
    low, middle, high = (float(np.percentile(clock, p)) for p in (25, 50, 75))
    return {"ms": middle, "ms_quartiles": [low, high], "ms_best": float(clock.min()), "cpu_ms": float(np.median(cpu))}


def machine() -> Row:
    """Describes what the numbers depend on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0))
    return {"cpu": model, "cores": cores, "load": os.getloadavg(), "python": platform.python_version(), **versions}


def report(result: dict[str, Any], arguments: argparse.Namespace) -> str:
    """The tables as Markdown."""
    rows, decode = result["loaders"], {row["name"]: row for row in result["decode"]}
    by_name = {(row["name"], row["workers"]): row for row in rows}
    base = next((row for row in rows if "baseline" in row["name"] and row["workers"] == 1), rows[0])
    about = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    lines = [f"{about}; {arguments.rounds} rounds of {arguments.images} images, batch {BATCH}", ""]
    lines += ["| loader | workers | images/s: median (quartiles) | ratio | fastest | ratio | CPU ms/image | ratio |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in rows:
        low, high = (1e3 / ms for ms in reversed(row["ms_quartiles"]))
        lines.append(
            f"| {row['name']} | {row['workers']} | {1e3 / row['ms']:.0f} ({low:.0f} to {high:.0f}) "
            f"| {base['ms'] / row['ms']:.2f} | {1e3 / row['ms_best']:.0f} | {base['ms_best'] / row['ms_best']:.2f} "
            f"| {row['cpu_ms']:.2f} | {base['cpu_ms'] / row['cpu_ms']:.2f} |"
        )
    lines += [f"| {name} | | {why} | | | | | |" for name, why in result["missing"].items()]
    lines += ["", "| in one process, from memory to uint8 | images/s | ratio | CPU ms/image |", "|---|---|---|---|"]
    first = result["decode"][0]
    for row in result["decode"]:
        lines.append(f"| {row['name']} | {1e3 / row['ms']:.0f} | {first['ms'] / row['ms']:.2f} | {row['cpu_ms']:.3f} |")
    lines += ["", "| | median | fastest round | CPU time |", "|---|---|---|---|"]
    for kind, name in (("original", "crate-dist, original images"), ("re-encoded", "crate-dist, re-encoded")):
        if loader := by_name.get((name, 1)):
            alone = decode[f"ours, {kind}"]
            shares = (1 - alone[unit] / loader[unit] for unit in ("ms", "ms_best", "cpu_ms"))
            lines.append(f"| loader overhead: {name} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    for kind in ("original", "re-encoded"):
        alone, all_of_it = decode[f"checksums alone, {kind}"], decode[f"ours, {kind}"]
        shares = (alone[unit] / all_of_it[unit] for unit in ("ms", "ms_best", "cpu_ms"))
        lines.append(f"| checksums against decoding: {kind} | " + " | ".join(f"{share:.2%}" for share in shares) + " |")
    for (name, workers), row in by_name.items():
        if workers > 1 and (one := by_name.get((name, 1))):
            speedups = " | ".join(f"{one[unit] / row[unit]:.2f}" for unit in ("ms", "ms_best"))
            lines.append(f"| 1 to {workers} workers: {name} | {speedups} | |")
    lines += ["", "| writer | processes | images/s | images per CPU second | CPU use |", "|---|---|---|---|---|"]
    for row in result["conversion"]:
        lines.append(
            f"| {row['name']} | {row['workers']} | {row['images_per_s']:.0f} | {row['images_per_cpu_s']:.0f} "
            f"| {row['cpu_use']:.0%} |"
        )
    lines += [
        "",
        "| short side | quality | bytes/image | fast against Pillow: median, 5 %, least | kept: median, 5 % |",
    ]
    lines += ["|---|---|---|---|---|"]
    for row in result["re-encoding"]:
        fast, kept = (", ".join(f"{v:.1f}" for v in row[key] or []) for key in ("fast_psnr_db", "kept_psnr_db"))
        lines.append(
            f"| {row['short_side'] or 'as it is'} | {row['quality'] or 'as it is'} | {row['bytes']:,.0f} "
            f"| {fast} dB | {kept + ' dB' if kept else ''} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
