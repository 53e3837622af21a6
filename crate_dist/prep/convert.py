"""From a source of images to finished splits: what the programs of data_prep that write shards share.

Everything that can be wrong is looked for before anything is written: all splits are listed, their folders and the
free space are checked, and only then the first shard is begun.
"""

from __future__ import annotations

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

from crate_dist.data.decode import BadImage
from crate_dist.data.index import INDEX_JSON, ShardError, ShardIndex
from crate_dist.prep.folders import Source, Split, first_few
from crate_dist.prep.images import ImageOptions, transcode
from crate_dist.prep.journal import CONVERSION_JSON, ConversionIdentity, SplitFolder, digest_of_classes, read_conversion
from crate_dist.prep.next_steps import next_steps
from crate_dist.prep.options import Options
from crate_dist.prep.parts import clear, held, merging, waits_for
from crate_dist.prep.pool import run_parallel
from crate_dist.prep.program import explained, progress_bar, tell, warn
from crate_dist.prep.shards import WHOLE, ShardPlan, ShardResult, make_shard
from crate_dist.wording import counted, duration, size

_TRIED_IMAGES = 32
_LISTED_SKIPPED = 1000


@dataclass(frozen=True, eq=False)
class _Job:
    """One split to be written."""

    split: Split
    plan: ShardPlan
    folder: SplitFolder
    estimated_bytes: int


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
    if unfinished and not _write(unfinished, source, options):
        return
    indexes = [job.folder.complete() for job in jobs]
    for job, index in zip(jobs, indexes, strict=True):
        if index is None:  # between this look and the last another conversion or a person was at work
            raise ShardError(f"{job.folder.path} is not complete any more; the same command writes what is missing")
        if job not in unfinished:
            tell(f"{job.folder.path} is complete already: {_size_of(index)}")
    if unfinished:
        _tell_duplicates([index for index in indexes if index is not None])
    tell("")
    for line in next_steps(options.out):
        tell(line)


def _plan(split: Split, folder: Path, source: Source, options: Options) -> _Job:
    plan = ShardPlan(folder, split.samples, options.seed, options.shard_samples)
    ratio = _size_ratio(plan, options.image_options) if options.image_options.changes_sizes else 1.0
    identity = ConversionIdentity.of(plan, source.classes, options.image_options)
    return _Job(split, plan, SplitFolder(plan, identity, options.part), plan.estimated_bytes(ratio))


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
        raise ShardError(f"--out {out} cannot be used: {error.strerror}; give a folder of its own") from error
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
            f"the shards need about {size(needed)} and {existing} has {size(free)} free; "
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
            f"about {size(job.estimated_bytes)}{state}"
        )


def _write(jobs: Sequence[_Job], source: Source, options: Options) -> bool:
    """Writes the splits, or this part of them and, where no other part is left, their indexes.

    Returns whether all is whole now; what is missing has been told.
    """
    with held(options.out, options.part):
        for job in jobs:  # from now on all know which splits there are to be
            with job.folder.taken(options.part):
                pass
        if options.part == WHOLE:
            for job in jobs:
                _write_split(job, source, options)
        else:
            for job in jobs:
                _write_share(job, options)
            if unwritten := {job.folder.path.name: missing for job in jobs if (missing := job.folder.missing())}:
                for line in waits_for(options.part, unwritten):
                    tell(line)
                return False
            with merging(options.out) as may:
                if not may:
                    return False
                for job in jobs:
                    if job.folder.complete() is None:
                        tell(f"part {options.part} is the last: all shards of {job.folder.path.name} are checked")
                        _write_split(job, source, options)
    clear(options.out)
    return True


def _write_share(job: _Job, options: Options) -> None:
    """Writes the shards of this part that no journal knows; what stands is checked when the index is made."""
    with job.folder.taken(options.part):
        own = options.part.share(job.plan.names())
        wanted = set(job.folder.missing(options.part))
        if wanted:
            job.folder.forget_index()
        tasks = job.plan.tasks(options.image_options, options.list_options.skip_bad, {}, wanted)
        images = sum(job.plan.samples_of(name) for name in wanted)
        with progress_bar(f"{job.folder.path.name} {options.part}", images, " images") as bar:
            for result in run_parallel(make_shard, tasks, max(min(options.workers, len(wanted)), 1), bar):
                job.folder.record(result.finished)
    tell(
        f"{job.folder.path.name}: part {options.part} is finished, {counted(len(own), 'shard')}"
        + (f", {len(own) - len(wanted)} of them from before" if len(own) > len(wanted) else "")
    )


def _write_split(job: _Job, source: Source, options: Options) -> None:
    """Writes all shards that do not stand as the journals say, checks the others, and writes the index."""
    started = time.monotonic()
    with job.folder.taken(WHOLE):
        job.folder.forget_index()
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
        rows = np.concatenate([result.rows for result in ordered])
        left_out = sum(len(result.finished.skipped) for result in results.values())
        if len(rows) + left_out != len(job.split.samples):
            raise ShardError(
                f"{job.folder.path} has {len(rows):,} images and {left_out:,} left out of the source's "
                f"{len(job.split.samples):,}; remove the folder to convert it anew"
            )
        made_by = _made_by(job, results, source, options)
        shards = [result.finished.shard for result in ordered]
        index = ShardIndex(job.folder.path, shards, rows, source.classes, source.class_names, made_by)
        with explained(f"cannot write {job.folder.path / INDEX_JSON}"):
            index.save()
            job.folder.join_journals()
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
        f"{index.root.name}: {_size_of(index)}; {duration(seconds)}"
        + (f", {made / max(seconds, 1e-9):,.0f} images/s" if made else "")
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


def _tell_duplicates(indexes: Sequence[ShardIndex]) -> None:
    """Tells how many images stand more than once, by their bytes; between splits they flatter the accuracy."""
    sums = [np.unique(index.rows["checksum"]) for index in indexes]
    for index, distinct in zip(indexes, sums, strict=True):
        if double := index.num_samples - len(distinct):
            tell(f"  {index.root.name}: {counted(double, 'image')} with the same bytes as another one")
    for i, first in enumerate(indexes):
        for j in range(i + 1, len(indexes)):
            if shared := len(np.intersect1d(sums[i], sums[j], assume_unique=True)):
                names = f"{first.root.name} and {indexes[j].root.name}"
                tell(f"  {counted(shared, 'image')} with the same bytes in {names}")


def _size_of(index: ShardIndex) -> str:
    total = sum(shard.bytes for shard in index.shards)
    present = len(np.unique(index.rows["label"]))
    return (
        f"{counted(index.num_samples, 'image')} of {counted(present, 'class', 'classes')} "
        f"in {counted(len(index.shards), 'shard')}, {size(total)}"
    )
