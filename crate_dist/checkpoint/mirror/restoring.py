"""Brings a run back from its mirror into a folder that does not have it, or not as far. Whole, or not at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from pathlib import Path

from tqdm import tqdm

from crate_dist.checkpoint.format import CheckpointError, read_manifest
from crate_dist.checkpoint.mirror.joining import NothingWhole, is_damage
from crate_dist.checkpoint.mirror.record import Copied, Mirrored, MirrorRecord, RunMirror
from crate_dist.data.index import ShardError
from crate_dist.data.remote.store import taking
from crate_dist.files import sync_folder
from crate_dist.run.checkpoints import newest_step, note_published, unfinished_name
from crate_dist.run.folder import RunFolder
from crate_dist.run.lock import Tenure

logger = logging.getLogger(__name__)

_OUR_OWN = ("recipe.toml",)
"""Files of the run that the start has written itself, from values that were compared."""


def restore(mirror: RunMirror, record: MirrorRecord, folder: RunFolder, tenure: Tenure) -> int:
    """Fetches the newest whole checkpoint, the best one and the run's files; returns the step.

    A copy that is damaged is named and passed over for the one before, if that is newer than what the folder has. What
    was fetched gets its names at the end: the files of the run, the best checkpoint, then the newest one, so that a
    start that is killed meanwhile is repeated.

    Raises
    ------
    NothingWhole: no copy that is newer is whole
    ShardError: the mirror cannot be reached, which is no reason to go back to an older one
    OSError, LostTheRun: the run folder cannot be written, or is another's now
    """
    began = time.monotonic()
    here, newest = newest_step(folder.checkpoints), None
    newer = [saved for saved in record.checkpoints if saved.step > here]
    for saved in reversed(newer):
        files = {place: file for place, file in saved.files.items() if place not in _OUR_OWN}
        if fetched := _fetched(mirror, record, saved, files, folder, tenure):
            newest = saved
            break
    if newest is None:
        than = f"newer than step {here} " if here >= 0 else ""
        raise NothingWhole(
            f"none of the {len(newer)} checkpoints {than}in {mirror} is whole; --start-over sets them aside"
        )
    assert fetched
    ready = [(fetched, newest)]
    best = next((saved for saved in record.checkpoints if saved.step == newest.best_step), newest)
    if best is not newest:
        files = {f"checkpoints/{best.name}/{name}": file for name, file in best.checkpoint_files.items()}
        if there := _fetched(mirror, record, best, files, folder, tenure):
            ready.append((there, best))
    for place in newest.run_files.keys() - {*_OUR_OWN}:
        tenure.check()
        (folder.path / place).parent.mkdir(parents=True, exist_ok=True)
        os.replace(fetched / place, folder.path / place)
    for there, saved in reversed(ready):
        tenure.check()
        final = folder.checkpoints / saved.name
        if not final.exists():
            (there / "checkpoints" / saved.name).replace(final)
    sync_folder(folder.checkpoints)
    note_published(folder.checkpoints, newest.step)
    for there, _ in ready:
        shutil.rmtree(there, ignore_errors=True)
    copied = sum(file.bytes for file in newest.files.values())
    logger.info(
        "RESTORED step %d of this run from %s: %.3g MB in %.0f s",
        newest.step,
        mirror,
        copied / 1e6,
        time.monotonic() - began,
    )
    return newest.step


def _fetched(
    mirror: RunMirror,
    record: MirrorRecord,
    saved: Mirrored,
    files: dict[str, Copied],
    folder: RunFolder,
    tenure: Tenure,
) -> Path | None:
    """Returns a folder with the files under their places in the run folder; None where one is damaged or gone."""
    beside = folder.checkpoints / unfinished_name(tenure.number, tenure.token, f"restored-{saved.name}")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with tqdm(
            total=sum(file.bytes for file in files.values()),
            desc=f"restoring {saved.name}",
            unit="B",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
        ) as bar:
            for place, file in files.items():
                path = beside / place
                path.parent.mkdir(parents=True, exist_ok=True)
                store, name = mirror.files(record.id, file.object)
                store.get(name, taking(path, file.bytes, file.sha256))
                bar.update(file.bytes)
        _check(beside, saved)
        return beside
    except (ShardError, CheckpointError, ValueError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, ShardError) and not is_damage(error):
            raise
        logger.warning("damaged copy of %s in %s passed over: %s", saved.name, mirror, error)
        return None


def _check(beside: Path, saved: Mirrored) -> None:
    """Raises CheckpointError or ValueError for what arrived as it was sent, and which no run has written."""
    if (step := read_manifest(beside / "checkpoints" / saved.name).progress.step) != saved.step:
        raise ValueError(f"its manifest is of step {step}")
    if (path := beside / "run.json").exists():
        said = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(said, dict) or not isinstance(said.get("starts"), list):
            raise ValueError("run.json is no record of a run")
