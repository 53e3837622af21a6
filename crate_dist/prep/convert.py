"""From a source of images to finished splits: what the programs of data_prep that write shards share.

Everything that can be wrong is looked for before anything is written: all splits are listed, their folders and the
free space are checked, and only then the first shard is begun.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from crate_dist.arguments import positive, whole_number
from crate_dist.data.decode import BadImage
from crate_dist.data.index import INDEX_JSON, ShardError, ShardIndex
from crate_dist.prep.folders import ListOptions, Source, Split, first_few
from crate_dist.prep.images import ImageOptions, transcode
from crate_dist.prep.journal import CONVERSION_JSON, ConversionIdentity, SplitFolder, digest_of_classes, read_conversion
from crate_dist.prep.next_steps import next_steps
from crate_dist.prep.pool import run_parallel
from crate_dist.prep.program import (
    counted,
    explained,
    human_bytes,
    human_time,
    program_parser,
    progress_bar,
    proper_fraction,
    tell,
    warn,
)
from crate_dist.prep.shards import ShardPlan, ShardResult, make_shard

_TRIED_IMAGES = 32
_LISTED_SKIPPED = 1000
_CONTINUES = """
An interrupted conversion continues when the same command is given again. The same images, seed and options give the
same bytes, at any number of workers.
"""


@dataclass(frozen=True)
class Options:
    """The options of a conversion, called as on the command line. program: the one that converts, for the record"""

    program: str
    source: Path
    out: Path
    workers: int
    seed: int
    shard_samples: int
    image_options: ImageOptions
    list_options: ListOptions
    dry_run: bool


@dataclass(frozen=True, eq=False)
class _Job:
    """One split to be written."""

    split: Split
    plan: ShardPlan
    folder: SplitFolder
    estimated_bytes: int


def conversion_parser(description: str | None, epilog: str) -> argparse.ArgumentParser:
    """Returns a parser with --source, --out and all options of a conversion."""
    parser = program_parser(description, epilog + _CONTINUES)
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help="folder that the images are in")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the shards: DIR/train/, DIR/val/"
    )
    seed = whole_number(0, 2**63 - 1)
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the one global shuffle [0]")
    parser.add_argument("--shard-samples", type=positive, default=1000, metavar="N", help="images per shard [1000]")
    parser.add_argument(
        "--short-side", type=positive, metavar="N", help="resize larger images so that their short side has N pixels"
    )
    parser.add_argument(
        "--quality", type=whole_number(1, 100), metavar="Q", help="re-encode every image as JPEG of quality Q; without "
        "it only images that are resized or no plain JPEG are, with 95"
    )  # fmt: skip
    parser.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be used, and list them")
    parser.add_argument("--verify-images", action="store_true", help="decode every image, also those that stay as is")
    parser.add_argument("--follow-links", action="store_true", help="follow links that lead out of the source")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    return parser


def add_val_fraction(parser: argparse.ArgumentParser, note: str) -> None:
    """Adds --val-fraction. note: what else there is to know of it"""
    parser.add_argument(
        "--val-fraction",
        type=proper_fraction,
        default=0.0,
        metavar="F",
        help=f"share of every class that is held out of the training images as val; {note}",
    )


def parsed(
    parser: argparse.ArgumentParser, lossless: bool = False, archive: bool = False
) -> tuple[argparse.Namespace, Options]:
    """Returns what the user typed, as it is and as the options of a conversion.

    lossless: as in ImageOptions; archive: the source may be a file. Raises ShardError when the folders cannot be meant.
    """
    arguments = parser.parse_args()
    source, out = arguments.source.expanduser().absolute(), arguments.out.expanduser().absolute()
    if not source.is_dir() and not (archive and source.is_file()):
        what = "is not a folder" if source.exists() else "does not exist"
        raise ShardError(f"--source {source} {what}; give the folder that the images are in")
    real_source, real_out = source.resolve(), out.resolve()
    if real_out == real_source or real_source in real_out.parents:
        raise ShardError(f"--out {out} lies in the source {source}; give a folder beside it")
    return arguments, Options(
        f"data_prep/{parser.prog}",
        source,
        out,
        arguments.workers,
        arguments.seed,
        arguments.shard_samples,
        ImageOptions(arguments.short_side, arguments.quality, arguments.verify_images, lossless),
        ListOptions(arguments.follow_links, arguments.skip_bad),
        arguments.dry_run,
    )


def convert(source: Source, options: Options) -> None:
    """Writes all splits of a source that are not finished yet, and tells the user what was done and what comes next.

    Raises ShardError; what is finished then is kept, and the same call continues.
    """
    for note in source.notes:
        warn(note)
    _check_out(source, options)
    jobs = [_plan(split, options.out / name, source, options) for name, split in source.splits.items()]
    for job in jobs:
        job.folder.check()
    unfinished = [job for job in jobs if job.folder.complete() is None]
    _tell_plan(source, jobs, unfinished, options)
    _check_space(unfinished, options.out)
    if options.dry_run:
        tell("dry run: nothing was written")
        return
    for job in unfinished:
        _write_split(job, source, options)
    for job in jobs:
        index = job.folder.complete()
        assert index is not None
        if job not in unfinished:
            tell(f"{job.folder.path} is complete already: {_size_of(index)}")
    tell("")
    for line in next_steps(options.out):
        tell(line)


def _plan(split: Split, folder: Path, source: Source, options: Options) -> _Job:
    plan = ShardPlan(folder, split.samples, options.seed, options.shard_samples)
    ratio = _size_ratio(plan, options.image_options) if options.image_options.changes_sizes else 1.0
    identity = ConversionIdentity.of(plan, source.classes, options.image_options)
    return _Job(split, plan, SplitFolder(plan, identity), plan.estimated_bytes(ratio))


def _size_ratio(plan: ShardPlan, image_options: ImageOptions) -> float:
    """Returns bytes after by bytes before, tried on a few images."""
    before = after = 0
    for i in plan.order()[:_TRIED_IMAGES]:
        try:
            data = plan.samples.read(int(i))
            after += len(transcode(data, image_options)[0])
        except (BadImage, ShardError):  # the conversion will say so, or leave the image out
            continue
        before += len(data)
    return after / before if before else 1.0


def _check_out(source: Source, options: Options) -> None:
    out = options.out
    try:
        names = sorted(os.listdir(out)) if out.exists() else []
    except OSError as error:
        raise ShardError(f"--out {out} cannot be used: {error.strerror}") from error
    foreign = []
    for name in names:
        if name in source.splits or name.startswith(".") or name == "lost+found":
            continue
        if not any((out / name / mark).exists() for mark in (CONVERSION_JSON, INDEX_JSON)):
            foreign.append(name)
            continue
        other = read_conversion(out / name)
        if other is not None and other.get("classes") != digest_of_classes(source.classes):
            raise ShardError(
                f"{out / name} was converted with other classes, so its labels would mean something else; "
                "convert all splits from one source, or give another --out"
            )
    if foreign:
        raise ShardError(f"--out {out} holds something else: {first_few(foreign, 3)}; give a folder of its own")


def _check_space(jobs: Sequence[_Job], out: Path) -> None:
    existing = next(folder for folder in (out, *out.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    needed = sum(max(job.estimated_bytes - job.folder.finished_bytes(), 0) for job in jobs)
    if needed > free:
        raise ShardError(
            f"the shards need about {human_bytes(needed)} and {existing} has {human_bytes(free)} free; "
            "make room, give another --out, or write smaller images with --short-side"
        )


def _tell_plan(source: Source, jobs: Sequence[_Job], unfinished: Sequence[_Job], options: Options) -> None:
    tell(f"source: {source.root} ({source.layout}), {len(source.classes)} classes")
    for job in jobs:
        state = ""
        if job not in unfinished:
            state = ", complete already"
        elif done := len(job.folder.finished()):
            state = f", {done} of them finished already"
        images, shards = counted(len(job.split.samples), "image"), counted(job.plan.num_shards, "shard")
        tell(
            f"{job.folder.path.name}: {images} -> {shards} of up to {options.shard_samples:,}, "
            f"about {human_bytes(job.estimated_bytes)}{state}"
        )


def _write_split(job: _Job, source: Source, options: Options) -> None:
    started = time.monotonic()
    job.folder.start()
    try:
        finished = job.folder.finished()
        tasks = job.plan.tasks(options.image_options, options.list_options.skip_bad, finished)
        results: dict[str, ShardResult] = {}
        workers = min(options.workers, job.plan.num_shards)
        with progress_bar(job.folder.path.name, len(job.split.samples), " images") as bar:
            for result in run_parallel(make_shard, tasks, workers, bar):
                if not result.kept:
                    job.folder.record(result.finished)
                results[result.finished.shard.name] = result
        ordered = [results[name] for name in job.plan.names() if results[name].finished.shard.samples]
        if not ordered:
            raise ShardError(f"no image of {job.folder.path.name} could be used")
        made_by = _made_by(job, results, source, options)
        rows = np.concatenate([result.rows for result in ordered])
        shards = [result.finished.shard for result in ordered]
        index = ShardIndex(job.folder.path, shards, rows, source.classes, source.class_names, made_by)
        with explained(f"cannot write {job.folder.path / INDEX_JSON}"):
            index.save()
    finally:
        job.folder.remove_temporary()
        job.folder.release()
    _tell_result(index, job.split, results, time.monotonic() - started)


def _made_by(job: _Job, results: dict[str, ShardResult], source: Source, options: Options) -> dict[str, Any]:
    oddities: Counter[str] = Counter()
    skipped = list(job.split.unreadable)
    for name in job.plan.names():
        oddities.update(results[name].finished.counted)
        skipped += results[name].finished.skipped
    return {
        "program": options.program,
        "layout": source.layout,
        "label": "cls",
        "seed": options.seed,
        "shard_samples": options.shard_samples,
        "short_side": options.image_options.short_side,
        "quality": options.image_options.quality,
        "pillow": PIL.__version__,
        "counted": dict(sorted(oddities.items())),
        "files_ignored": job.split.ignored,
        "images_left_out": len(skipped),
        "left_out": skipped[:_LISTED_SKIPPED],
    }


def _tell_result(index: ShardIndex, split: Split, results: dict[str, ShardResult], seconds: float) -> None:
    kept = sum(result.kept for result in results.values())
    made = sum(len(result.rows) for result in results.values() if not result.kept)
    tell(
        f"{index.root.name}: {_size_of(index)}; {human_time(seconds)}, {made / max(seconds, 1e-9):,.0f} images/s"
        + (f", {counted(kept, 'shard')} kept from before" if kept else "")
    )
    oddities = dict(index.made_by["counted"])
    changed = oddities.pop("re-encoded", 0)
    numbers = {"byte for byte": index.num_samples - changed, "re-encoded": changed, **oddities}
    tell("  " + ", ".join(f"{number:,} {name}" for name, number in numbers.items() if number))
    if split.ignored:
        tell(f"  {counted(split.ignored, 'file')} passed over, hidden or without an image's extension")
    if left_out := index.made_by["images_left_out"]:
        tell(f"  {counted(left_out, 'image')} left out, listed in {index.root / INDEX_JSON}:")
        for line in index.made_by["left_out"][:5]:
            tell(f"    {line}")


def _size_of(index: ShardIndex) -> str:
    total = sum(shard.bytes for shard in index.shards)
    present = len(np.unique(index.rows["label"]))
    return (
        f"{counted(index.num_samples, 'image')} of {counted(present, 'class', 'classes')} "
        f"in {counted(len(index.shards), 'shard')}, {human_bytes(total)}"
    )
