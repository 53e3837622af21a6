"""What a start finds in its run's mirror: the same run or another one, which refuses it, and who writes there now."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crate_dist.checkpoint.format import Manifest, read_manifest
from crate_dist.checkpoint.mirror.record import MirrorError, MirrorRecord, RunMirror, Writer, manifest_of
from crate_dist.config import Recipe, load_recipe
from crate_dist.data.remote.store import LOOKING, taking
from crate_dist.files import write_whole
from crate_dist.run.checkpoints import newest_step
from crate_dist.run.folder import RunFolder, differing_values
from crate_dist.run.record import new_run_id

logger = logging.getLogger(__name__)

_BEATS = 2.5
"""Signs of life that a writer may leave out before it is believed to be gone."""


@dataclass(frozen=True)
class Found:
    """What is in the mirror of a run folder.

    manifest: of the checkpoint that the run will go on with from there; None: it has no newer one than the run folder
    """

    mirror: RunMirror
    record: MirrorRecord | None
    manifest: Manifest | None

    def __str__(self) -> str:
        if self.record is None or not self.record.checkpoints:
            return f"{self.mirror} answers, and has no checkpoint of this run yet"
        if self.manifest is None:
            return f"{self.mirror} answers, and has step {self.record.step} of this run"
        return f"{self.mirror}: GOES ON FROM STEP {self.record.step} THERE, which the run folder does not have"


def look(folder: RunFolder, recipe: Recipe, start_over: bool = False) -> Found | None:
    """Looks what a start of the run would find in its mirror, and changes nothing; None where it has no mirror.

    Raises
    ------
    MirrorError: another run's, or another recipe's
    ShardError: it does not answer
    """
    place = recipe.checkpoint.find_mirror()
    if place is None:
        return None
    mirror = RunMirror(place, folder, LOOKING)
    record = mirror.read()
    if record is None or start_over or _is_to_be_replaced(record, folder):
        return Found(mirror, record, None)
    check_same_run(mirror, record, folder)
    if record.step <= newest_step(folder.checkpoints):
        return Found(mirror, record, None)
    check_recipe(mirror, record, recipe)
    assert record.newest
    with tempfile.TemporaryDirectory() as scratch:
        copied = manifest_of(record.newest)
        store, name = mirror.files(record.id, copied.object)
        store.get(name, taking(Path(scratch, name), copied.bytes, copied.sha256))
        return Found(mirror, record, read_manifest(Path(scratch)))


def check_same_run(mirror: RunMirror, record: MirrorRecord, folder: RunFolder) -> None:
    """Raises MirrorError when the record is of another run than the folder, which has an id or checkpoints."""
    own = folder.record.run_id()
    if record.id == own or (own is None and newest_step(folder.checkpoints) < 0):
        return
    raise MirrorError(
        f"{mirror} holds another run than {folder.path}: that of {record.writer}, up to step {record.step}. Give this "
        "run a folder of another name, or another checkpoint.mirror; --start-over sets aside both the folder's run and "
        "that one; an empty folder of this name goes on with that one"
    )


def check_recipe(mirror: RunMirror, record: MirrorRecord, recipe: Recipe) -> None:
    """Raises MirrorError when the run in the mirror has other values that decide the result."""
    assert record.newest
    copied = record.newest.run_files.get("recipe.toml")
    if copied is None:
        raise MirrorError(f"{mirror}: no recipe is beside {record.newest.name}")
    store, name = mirror.files(record.id, copied.object)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "recipe.toml")
        store.get(name, taking(path, copied.bytes, copied.sha256))
        there = load_recipe(path)
    if changed := differing_values(there, recipe):
        listing = "\n".join(f"  {line}" for line in changed)
        raise MirrorError(
            f"{mirror} holds a run of another recipe:\n{listing}\n"
            "to go on with that run, give the same values; to begin a new one, a run folder of another name, another "
            "checkpoint.mirror, or --start-over, which sets that one aside"
        )


def find(mirror: RunMirror, folder: RunFolder, me: Writer) -> MirrorRecord:
    """Returns the record of the run, once nobody else writes there; a new one where there is none.

    Raises
    ------
    MirrorError: it holds another run; or the writer is in another folder, and lives
    ShardError: it cannot be reached, or another run's record not be set aside
    """
    record = mirror.read(LOOKING)
    if record is not None and _is_to_be_replaced(record, folder):
        logger.warning("%s held another run, which is set aside there as mirror-%s.json", mirror, record.id)
        mirror.keep_aside(record)
        record = None
    if record is None:
        return MirrorRecord(folder.record.run_id() or new_run_id(), me)
    check_same_run(mirror, record, folder)
    if not record.writer.ended and record.writer.token != noted(folder).get("writer"):
        record = _wait_for(mirror, record)
    return record


def take(mirror: RunMirror, folder: RunFolder, record: MirrorRecord, me: Writer) -> MirrorRecord:
    """Makes this process the writer of the mirror, and returns the record, which says so.

    Raises MirrorError: another start was faster; ShardError: the mirror cannot be written.
    """
    record = replace(record, writer=replace(me, number=record.writer.number + 1)).sign()
    note(folder, writer=me.token, step=record.step)
    mirror.write(record)
    check_writer(mirror, me)
    folder.record.note_run_id(record.id)
    return record


def check_writer(mirror: RunMirror, me: Writer) -> None:
    """Raises MirrorError when another start has become the writer of the mirror; ShardError when it cannot be seen."""
    now = mirror.read(LOOKING)
    if now is not None and now.writer.token != me.token and now.writer.number >= me.number:
        raise MirrorError(
            f"{mirror} is written by another start of this run: {now.writer}. Nothing more is copied there from here; "
            "one of the two should be ended"
        )


def note(folder: RunFolder, **facts: Any) -> None:
    """Puts facts down in the run folder's mirror.json, beside those that stand there. Raises OSError."""
    write_whole(folder.mirror, json.dumps({**noted(folder), **facts}) + "\n")


def noted(folder: RunFolder) -> dict[str, Any]:
    """Reads what note has put down; nothing where that cannot be read."""
    try:
        said = json.loads(folder.mirror.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _is_to_be_replaced(record: MirrorRecord, folder: RunFolder) -> bool:
    return folder.record.was_started_over() and record.id != folder.record.run_id()


def _wait_for(mirror: RunMirror, record: MirrorRecord) -> MirrorRecord:
    """Waits to see whether the writer lives, which is another folder's or another machine's. Raises MirrorError."""
    longest_s = _BEATS * record.writer.beat_s
    logger.info("%s was written by %s: up to %.0f s to see whether it lives", mirror, record.writer, longest_s)
    until = time.monotonic() + longest_s
    while time.monotonic() < until:
        time.sleep(min(record.writer.beat_s / 4, 5.0))
        now = mirror.read(LOOKING)
        if now is None or now.writer.ended:
            return now or record
        if now.writer != record.writer:
            raise MirrorError(
                f"{mirror} is in use by {now.writer}: the same run, in another folder. Wait for it, end it, or give "
                "another checkpoint.mirror"
            )
    logger.warning("%s is taken over from %s, which gives no sign of life", mirror, record.writer)
    return record
