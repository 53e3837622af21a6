"""Copies a run's newest and best checkpoint into its mirror, and keeps the record of what is whole there."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from crate_dist.checkpoint.format import MANIFEST, CheckpointError, read_manifest
from crate_dist.checkpoint.mirror.joining import check_writer, fetch_small
from crate_dist.checkpoint.mirror.record import Copied, Mirrored, MirrorRecord, RunMirror
from crate_dist.data.index import ShardError
from crate_dist.data.remote.store import Stopped
from crate_dist.run.checkpoints import checkpoint_names, newest_step, step_name
from crate_dist.run.folder import EVENTS, MODELS, RunFolder

logger = logging.getLogger(__name__)


class Copier:
    """Copies to a mirror that this process writes.

    record: as it is there, with this process as its writer; keep: newest checkpoints that stay, beside the best one
    check: raises LostTheRun when the run folder is another's

    Its methods raise
    ------
    ShardError: the mirror does not work; what was whole in it is
    MirrorError: another start writes there now
    CheckpointError, OSError: the run folder's own checkpoint is damaged, or cannot be read
    """

    def __init__(
        self, mirror: RunMirror, folder: RunFolder, record: MirrorRecord, keep: int, check: Callable[[], None]
    ) -> None:
        self._mirror, self._folder, self._keep, self._check = mirror, folder, keep, check
        self.record = record
        self._copies = 0
        self._cannot_remove = False
        self._mutex = threading.Lock()

    def copy(self, exported: bool = False) -> bool:
        """Copies the newest checkpoint and the best one, unless they are there; tells whether anything was sent.

        exported: the weights alone too, and the files of the run though the checkpoint is there
        """
        check_writer(self._mirror, self.record.writer)
        names = checkpoint_names(self._folder.checkpoints)
        if not names:
            return False
        step = newest_step(self._folder.checkpoints)
        if self.record.step > step:  # of a history that was not gone on from, since it is damaged
            self._write(lambda record: record.up_to(step).sign())
        newest, best, news = names[-1], list[str](), False
        with contextlib.suppress(FileNotFoundError):
            best_step = read_manifest(self._folder.checkpoints / newest).progress.best_step
            best = [name for name in names if name.partition(".")[0] == step_name(best_step)][-1:]
        for name in dict.fromkeys([newest, *best]):
            began = time.monotonic()
            try:
                sent = self._copy_one(name, exported and name == newest)
            except FileNotFoundError:  # old enough to be removed meanwhile: there is a newer one, whose turn comes
                continue
            if sent:
                news, seconds = True, time.monotonic() - began
                logger.info("copied %s to the mirror %s: %.3g MB in %.1f s", name, self._mirror, sent / 1e6, seconds)
        return news

    def sign(self, ended: bool = False) -> None:
        """Gives a sign of life in the mirror; the last one."""
        self._write(lambda record: record.sign(ended=ended))

    def _copy_one(self, name: str, exported: bool) -> int:
        """Copies one checkpoint, with the files of the run as they are now; returns the bytes that were sent."""
        path = self._folder.checkpoints / name
        manifest, text = read_manifest(path), (path / MANIFEST).read_bytes()
        expected = {file: (said.bytes, said.sha256) for file, said in manifest.files.items()}
        expected[MANIFEST] = len(text), hashlib.sha256(text).hexdigest()
        there = next((saved for saved in self.record.checkpoints if saved.name == name), None)
        is_there = there and {k: (v.bytes, v.sha256) for k, v in there.checkpoint_files.items()} == expected
        if is_there and not exported:
            return 0
        self._copies += 1
        folder = f"{name}.{self.record.writer.token[:12]}{self._copies:04x}"
        files: dict[str, Copied] = {}
        to_send: dict[str, tuple[Path, int]] = {}
        for file, (size, _) in expected.items():
            place = f"checkpoints/{name}/{file}"
            if is_there and there:
                files[place] = there.files[place]
            else:
                to_send[place] = path / file, size
        for place, file_path in run_files(self._folder, exported).items():
            size, before = file_path.stat().st_size, self.record.newest and self.record.newest.files.get(place)
            if before and before.bytes == size and EVENTS in place:  # of a start before, or no news
                files[place] = before
            else:
                to_send[place] = file_path, size
        objects = {place: f"{folder}/{object_name(place)}" for place in to_send}
        left = self._remove({*self.record.unfinished} - self.record.objects())  # by a copy that failed
        unfinished = (*left, *objects.values())
        self._write(lambda record: replace(record, unfinished=unfinished).sign())
        for place, (source, size) in to_send.items():
            self._check()
            store, object_ = self._mirror.files(self.record.id, objects[place])
            bytes_, sha256 = store.put(object_, source, size)
            copied = files[place] = Copied(objects[place], bytes_, sha256)
            file = place.rpartition("/")[2]
            if place.startswith("checkpoints/") and (copied.bytes, copied.sha256) != expected[file]:
                raise CheckpointError(f"{source} does not have the digest in its manifest, and is not mirrored")
        manifest_there = files[f"checkpoints/{name}/{MANIFEST}"]
        fetch_small(self._mirror, self.record, manifest_there, MANIFEST, lambda _: None)  # before an older one may go
        progress = manifest.progress
        self._publish(Mirrored(name, progress.step, progress.best_step, files))
        return sum(size for _, size in to_send.values())

    def _publish(self, saved: Mirrored) -> None:
        """Writes the record with one more checkpoint, without those that are too old; then removes their files."""
        others = [one for one in self.record.checkpoints if one.name != saved.name]
        every = sorted([*others, saved], key=lambda one: (one.step, one.name))
        steps = sorted({one.step for one in every})[-self._keep :]
        last = {one.step: one for one in every}
        kept = [one for step, one in last.items() if step in (*steps, every[-1].best_step)]
        before = self.record.objects() | {*self.record.unfinished}
        doomed = before - replace(self.record, checkpoints=tuple(kept)).objects()
        unfinished = tuple(sorted(doomed))
        self._write(lambda record: replace(record, checkpoints=tuple(kept), unfinished=unfinished).sign())
        left = tuple(self._remove(doomed))
        with self._mutex:
            self.record = replace(self.record, unfinished=left)

    def _remove(self, names: Collection[str]) -> list[str]:
        """Removes files that belong to no checkpoint any more; returns those that are left."""
        for number, name in enumerate(sorted(names)):
            store, file = self._mirror.files(self.record.id, name)
            try:
                store.remove(file)
            except Stopped:
                raise
            except ShardError as error:
                if not self._cannot_remove:
                    logger.warning("what is not needed any more stays in the mirror for now: %s", error)
                self._cannot_remove = True
                return sorted(names)[number:]
        return []

    def _write(self, change: Callable[[MirrorRecord], MirrorRecord]) -> None:
        """Writes the record as `change` makes it; signs of life are given while a checkpoint is copied."""
        with self._mutex:
            check_writer(self._mirror, self.record.writer)
            record = change(self.record)
            self._mirror.write(record)
            self.record = record


def run_files(folder: RunFolder, exported: bool = False) -> dict[str, Path]:
    """Returns the files of a run that are copied beside a checkpoint, by their place in the run folder.

    exported: the weights alone too
    """
    paths = [folder.recipe_file, folder.record_file, folder.metrics, folder.ledger, folder.bad_samples]
    paths += folder.event_files()
    if exported:
        paths += [path for kind in MODELS for path in (folder.model(kind), folder.model(kind).with_suffix(".md"))]
    return {str(path.relative_to(folder.path)): path for path in paths if path.is_file()}


def object_name(place: str) -> str:
    """Returns the name in the mirror of a file of the run folder: without folders, and without odd characters."""
    return re.sub(r"[^A-Za-z0-9_.=+-]", "_", place.rpartition("/")[2])
