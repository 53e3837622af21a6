"""What a start finds in its run's mirror: the same run or another one, which refuses it, and who writes there now."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from crate_dist.checkpoint.format import MANIFEST, CheckpointError, Manifest, read_manifest
from crate_dist.checkpoint.mirror.record import Copied, DamagedRecord, MirrorError, MirrorRecord, RunMirror, Writer
from crate_dist.config import Recipe, load_recipe
from crate_dist.data.index import ShardError
from crate_dist.data.remote.fetch import Damaged, NotThere
from crate_dist.data.remote.store import LOOKING, taking
from crate_dist.files import write_whole
from crate_dist.run.checkpoints import newest_step
from crate_dist.run.folder import RunFolder, differing_values
from crate_dist.run.record import new_run_id

logger = logging.getLogger(__name__)

T = TypeVar("T")
_BEATS = 2.5
"""Signs of life that a writer may leave out before it is believed to be gone."""


class NothingWhole(MirrorError):
    """The mirror has a newer checkpoint than the run folder, but none that is whole."""


@dataclass(frozen=True)
class Found:
    """What is in the mirror of a run folder.

    manifest: of the checkpoint that the run will go on with from there; None: it has no newer one than the run folder
    problem: for which the run goes on from its folder
    """

    mirror: RunMirror
    record: MirrorRecord | None
    manifest: Manifest | None
    problem: str = ""

    def __str__(self) -> str:
        if self.problem:
            return self.problem
        if self.record is None and self.mirror.store.is_empty_folder():
            return (
                f"{self.mirror.store.root} is an empty folder: this is the first run there, or something is not mounted"
            )
        if self.record is None or not self.record.checkpoints:
            return f"{self.mirror} answers, and has no checkpoint of this run yet"
        if self.manifest is None:
            return f"{self.mirror} answers, and has step {self.record.step} of this run"
        return (
            f"{self.mirror}: GOES ON FROM STEP {self.manifest.progress.step} THERE, which the run folder does not have"
        )


def look(folder: RunFolder, recipe: Recipe, start_over: bool = False) -> Found | None:
    """Looks what a start of the run would find in its mirror, and changes nothing; None where it has no mirror.

    Raises
    ------
    MirrorError: another run's, or another recipe's
    ShardError: it does not answer, or, DamagedRecord, what it has cannot be read, nor has the folder a checkpoint
    """
    place = recipe.checkpoint.find_mirror()
    if place is None:
        return None
    mirror = RunMirror(place, folder, LOOKING)
    here = newest_step(folder.checkpoints)
    try:
        record = mirror.read()
    except DamagedRecord as error:
        if start_over or folder.record.was_started_over():
            return Found(mirror, None, None, f"{error}, as this start does")
        if here < 0:
            raise
        return Found(mirror, None, None, f"{error}. The run goes on from step {here} of its folder")
    if record is None or start_over or _is_to_be_replaced(record, folder):
        return Found(mirror, record, None)
    check_same_run(mirror, record, folder)
    if record.step <= here:
        return Found(mirror, record, None)
    try:
        check_recipe(mirror, record, recipe, here)
        manifest = _of_newest(
            mirror, record, here, f"checkpoints/{{}}/{MANIFEST}", lambda path: read_manifest(path.parent)
        )
    except NothingWhole as error:
        if here < 0:
            raise
        return Found(mirror, record, None, f"{error}. The run goes on from step {here} of its folder")
    return Found(mirror, record, manifest)


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


def check_recipe(mirror: RunMirror, record: MirrorRecord, recipe: Recipe, here: int = -1) -> None:
    """Raises MirrorError when the run in the mirror has other values that decide the result.

    Any whole copy of the recipe will do, as it is one run; NothingWhole: there is none beside a checkpoint after step
    `here`.
    """
    there = _of_newest(mirror, record, here, "recipe.toml", load_recipe)
    if changed := differing_values(there, recipe):
        listing = "\n".join(f"  {line}" for line in changed)
        raise MirrorError(
            f"{mirror} holds a run of another recipe:\n{listing}\n"
            "to go on with that run, give the same values; to begin a new one, a run folder of another name, another "
            "checkpoint.mirror, or --start-over, which sets that one aside"
        )


def is_damage(error: ShardError) -> bool:
    """Tells whether a file could not be fetched since it is damaged or gone, while the mirror itself answers."""
    return isinstance(error, NotThere) or isinstance(error.__cause__, Damaged)


def fetch_small(mirror: RunMirror, record: MirrorRecord, copied: Copied, name: str, read: Callable[[Path], T]) -> T:
    """Returns what `read` makes of a file of the mirror, which it finds under a name. Raises ShardError."""
    store, object_ = mirror.files(record.id, copied.object)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, name)
        store.get(object_, taking(path, copied.bytes, copied.sha256))
        return read(path)


def _of_newest(mirror: RunMirror, record: MirrorRecord, here: int, place: str, read: Callable[[Path], T]) -> T:
    """Reads a file of the newest checkpoint after step `here` whose copy of it is whole. Raises NothingWhole."""
    for saved in reversed(record.checkpoints):
        copied = saved.files.get(place.format(saved.name))
        if saved.step <= here or copied is None:
            continue
        try:
            return fetch_small(mirror, record, copied, Path(place).name, read)
        except (ShardError, CheckpointError) as error:
            if isinstance(error, ShardError) and not is_damage(error):
                raise
            logger.warning("damaged copy of %s in %s passed over: %s", saved.name, mirror, error)
    newer = [saved.name for saved in record.checkpoints if saved.step > here]
    raise NothingWhole(
        f"{mirror} has no whole {Path(place).name} beside {', '.join(newer)}; --start-over sets them aside"
    )


def find(mirror: RunMirror, folder: RunFolder, me: Writer) -> MirrorRecord:
    """Returns the record of the run, once nobody else writes there; a new one where there is none.

    Raises
    ------
    MirrorError: it holds another run; or the writer is in another folder, and lives
    ShardError: it cannot be reached, or read, or another run's record not be set aside
    """
    try:
        record = mirror.read(LOOKING)
    except DamagedRecord as error:
        if not folder.record.was_started_over():
            raise
        logger.warning("%s; it is set aside there as %s", error, mirror.keep_damaged_aside())
        record = None
    if record is not None and _is_to_be_replaced(record, folder):
        logger.warning("%s held another run, which is set aside there as mirror-%s.json", mirror, record.id)
        mirror.keep_aside(record)
        record = None
    if record is None:
        if mirror.store.is_empty_folder():
            logger.warning(
                "%s is an empty folder: the first run is mirrored there now. If it is where something is mounted, "
                "that is missing; let checkpoint.mirror name a folder in it",
                mirror.store.root,
            )
        return MirrorRecord(folder.record.run_id() or new_run_id(), me)
    check_same_run(mirror, record, folder)
    me_before = noted(folder).get("writer"), str(folder.path.absolute())  # a copied folder has the token as well
    if not record.writer.ended and (record.writer.token, record.writer.folder) != me_before:
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
    """Looks whether a mirror that this process has written still is as it left it.

    Raises
    ------
    MirrorError: another start has become its writer
    ShardError: that cannot be seen, or there is no record any more
    """
    now = mirror.read(LOOKING)
    if now is None:
        raise ShardError(
            f"{mirror} does not have the record that was written there: it keeps nothing, or something is not mounted, "
            "or it was removed, and then the next start copies anew"
        )
    if now.writer.token != me.token and now.writer.number >= me.number:
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
