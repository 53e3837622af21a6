"""Copies published checkpoints to the mirror, in a thread of rank 0 that no step of the training ever waits for."""

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
from typing import Any

from crate_dist.checkpoint.format import MANIFEST, CheckpointError, read_manifest
from crate_dist.checkpoint.mirror.joining import check_recipe, check_writer, find, note, take
from crate_dist.checkpoint.mirror.record import Copied, Mirrored, MirrorError, MirrorRecord, RunMirror, Writer
from crate_dist.checkpoint.mirror.restoring import restore
from crate_dist.config import Recipe
from crate_dist.data.index import ShardError
from crate_dist.data.remote.fetch import RetryPolicy
from crate_dist.data.remote.store import STORING, Stopped
from crate_dist.run.checkpoints import checkpoint_names, newest_step, step_name
from crate_dist.run.folder import RunFolder
from crate_dist.run.lock import LostTheRun, Tenure

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.2
_SAID_EVERY = 10
"""Failures in a row of which one is told as an error, after the first."""
_LONGEST_PAUSE = 10
"""Signs of life that are left out at most while the mirror does not work."""


class Mirror:
    """The mirror of a run, on rank 0: it is restored from, then written to.

    folder: opened by this process, whose tenure it is; beat_s: seconds between two signs of life in the mirror

    failures: copies that have failed in a row; step: of the newest checkpoint that is whole there
    """

    def __init__(
        self,
        place: Path | str,
        folder: RunFolder,
        recipe: Recipe,
        tenure: Tenure,
        policy: RetryPolicy = STORING,
        beat_s: float | None = None,
    ) -> None:
        self._folder, self._recipe, self._tenure = folder, recipe, tenure
        self._mirror = RunMirror(place, folder, policy)
        self._me = Writer.of_this_process(folder.path, beat_s or 2.0 * recipe.safety.lease_s)
        self._record: MirrorRecord | None = None
        self._copies = 0
        self._exported = self._cannot_remove = False
        self._due, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self.failures = 0
        self.problem = ""

    @property
    def step(self) -> int:
        """The step of the newest checkpoint that is whole there; -1: none, or none that is known of."""
        return self._record.step if self._record else -1

    def begin(self) -> None:
        """Takes the mirror over, and brings what the run folder does not have from there; then copies in a thread.

        Raises
        ------
        MirrorError: it holds another run, another recipe's, or no whole checkpoint; another start writes there; or it
            does not work, and the run folder has no checkpoint to go on from
        ShardError: it has a newer checkpoint than the run folder, which cannot be fetched
        """
        there, record = newest_step(self._folder.checkpoints), None
        try:
            record = find(self._mirror, self._folder, self._me)
            self._record = take(self._mirror, self._folder, record, self._me)
            self._me = self._record.writer
        except ShardError as error:
            if max(there, record.step if record else -1) < 0:
                raise MirrorError(
                    f"{error}. Nothing is started: this run folder has no checkpoint, and the run may be in that "
                    "mirror. Bring it back, or --set checkpoint.mirror= starts without one"
                ) from error
            self._fail(error)
        if record and record.step > there:
            check_recipe(self._mirror, record, self._recipe)
            restore(self._mirror, record, self._folder, self._tenure)
        self._due.set()
        self._thread.start()

    def published(self) -> None:
        """Has the newest checkpoint copied, and the best one, as soon as may be. Returns at once."""
        self._due.set()

    def finish(self, leave: Callable[[], bool], exported: bool = False) -> None:
        """Waits for the newest checkpoint to be in the mirror, until `leave` says so; then leaves the mirror.

        exported: the weights were, and go there too
        """
        newest = newest_step(self._folder.checkpoints)
        if self._thread.is_alive() and self.step < newest:
            logger.info("waiting for step %d to be in the mirror %s", newest, self._mirror)
        self._exported = exported
        self._closing.set()
        self._due.set()
        while self._thread.is_alive() and not leave():
            self._thread.join(_LOOK_EVERY_S)
        in_time = not self._thread.is_alive()
        self.leave()
        if self.step >= newest:
            logger.info("step %d is in the mirror %s", self.step, self._mirror)
            return
        logger.error(
            "step %d IS NOT IN THE MIRROR %s, which has %s; the next start copies it. %s",
            newest,
            self._mirror,
            f"step {self.step}" if self.step >= 0 else "none",
            self.problem or ("" if in_time else "There was no more time for it."),
        )

    def leave(self) -> None:
        """Ends what is under way, for an end that waits for nothing."""
        self._mirror.store.stop()

    def _work(self) -> None:
        try:
            while True:
                due = self._due.wait(self._me.beat_s * max(1, min(self.failures, _LONGEST_PAUSE)))
                self._due.clear()
                closing = self._closing.is_set()
                try:
                    self._turn(copy=due or self.failures > 0)
                    if self.failures:
                        logger.info("the mirror %s works again, after %d failures", self._mirror, self.failures)
                        self.failures, self.problem = 0, ""
                        self._note()
                except Stopped:
                    raise
                except (ShardError, CheckpointError, OSError) as error:
                    self._fail(error)
                if closing:
                    with contextlib.suppress(ShardError):
                        self._sign(ended=True)
                    return
        except Stopped:
            pass
        except LostTheRun as error:
            logger.warning("nothing more is copied to the mirror %s: %s", self._mirror, error)
        except MirrorError as error:
            self.problem = str(error)
            logger.error("NOTHING IS MIRRORED ANY MORE, training goes on. %s", error)
        except Exception:  # whatever it is, it is no reason to end a training
            logger.exception("NOTHING IS MIRRORED ANY MORE, training goes on")

    def _turn(self, copy: bool) -> None:
        """Copies what is not there yet, or gives a sign of life alone."""
        self._tenure.check()
        if self._record is None:
            record = find(self._mirror, self._folder, self._me)
            if record.step > newest_step(self._folder.checkpoints):
                raise MirrorError(f"{self._mirror} has step {record.step} of this run, which this start did not see")
            self._record = take(self._mirror, self._folder, record, self._me)
            self._me = self._record.writer
        elif not copy:
            self._sign()
        if copy:
            self._copy()

    def _copy(self) -> None:
        """Copies the newest checkpoint and the best one, unless they are there."""
        names = checkpoint_names(self._folder.checkpoints)
        if not names:
            return
        newest, best = names[-1], list[str]()
        with contextlib.suppress(FileNotFoundError):
            best_step = read_manifest(self._folder.checkpoints / newest).progress.best_step
            best = [name for name in names if name.partition(".")[0] == step_name(best_step)][-1:]
        for name in dict.fromkeys([newest, *best]):
            began = time.monotonic()
            try:
                sent = self._copy_one(name, again=self._exported and name == newest)
            except FileNotFoundError:  # old enough to be removed meanwhile: there is a newer one, whose turn comes
                continue
            if sent:
                seconds = time.monotonic() - began
                logger.info("copied %s to the mirror %s: %.3g MB in %.1f s", name, self._mirror, sent / 1e6, seconds)
                self._note()

    def _copy_one(self, name: str, again: bool) -> int:
        """Copies one checkpoint, with the files of the run as they are now; returns the bytes that were sent.

        again: though it is there, for the files of the run
        """
        assert self._record
        path = self._folder.checkpoints / name
        manifest, text = read_manifest(path), (path / MANIFEST).read_bytes()
        expected = {file: (said.bytes, said.sha256) for file, said in manifest.files.items()}
        expected[MANIFEST] = len(text), hashlib.sha256(text).hexdigest()
        there = next((saved for saved in self._record.checkpoints if saved.name == name), None)
        is_there = there and {k: (v.bytes, v.sha256) for k, v in there.checkpoint_files.items()} == expected
        if is_there and not again:
            return 0
        self._copies += 1
        folder = f"{name}.{self._me.token[:12]}{self._copies:04x}"
        files: dict[str, Copied] = {}
        to_send: dict[str, tuple[Path, int]] = {}
        for file, (size, _) in expected.items():
            place = f"checkpoints/{name}/{file}"
            if is_there and there:
                files[place] = there.files[place]
            else:
                to_send[place] = path / file, size
        for place, file_path in run_files(self._folder, exported=self._exported).items():
            size, before = file_path.stat().st_size, self._record.newest and self._record.newest.files.get(place)
            if before and before.bytes == size and place.startswith("tensorboard/"):  # of a start before, or no news
                files[place] = before
            else:
                to_send[place] = file_path, size
        objects = {place: f"{folder}/{object_name(place)}" for place in to_send}
        left = self._remove({*self._record.unfinished} - self._record.objects())  # by a copy that failed
        self._write(unfinished=(*left, *objects.values()))
        for place, (source, size) in to_send.items():
            self._tenure.check()
            store, object_ = self._mirror.files(self._record.id, objects[place])
            bytes_, sha256 = store.put(object_, source, size)
            copied = files[place] = Copied(objects[place], bytes_, sha256)
            file = place.rpartition("/")[2]
            if place.startswith("checkpoints/") and (copied.bytes, copied.sha256) != expected[file]:
                raise CheckpointError(f"{source} does not have the digest in its manifest, and is not mirrored")
        progress = manifest.progress
        self._publish(Mirrored(name, progress.step, progress.best_step, files))
        return sum(size for _, size in to_send.values())

    def _publish(self, saved: Mirrored) -> None:
        """Writes the record with one more checkpoint, without those that are too old; then removes their files."""
        assert self._record
        others = [one for one in self._record.checkpoints if one.name != saved.name]
        every = sorted([*others, saved], key=lambda one: (one.step, one.name))
        steps = sorted({one.step for one in every})[-self._recipe.checkpoint.keep :]
        last = {one.step: one for one in every}
        kept = [one for step, one in last.items() if step in (*steps, every[-1].best_step)]
        before = self._record.objects() | {*self._record.unfinished}
        doomed = before - replace(self._record, checkpoints=tuple(kept)).objects()
        self._write(checkpoints=tuple(kept), unfinished=tuple(sorted(doomed)))
        self._record = replace(self._record, unfinished=tuple(self._remove(doomed)))

    def _remove(self, names: Collection[str]) -> list[str]:
        """Removes files that belong to no checkpoint any more; returns those that are left."""
        assert self._record
        for number, name in enumerate(sorted(names)):
            store, file = self._mirror.files(self._record.id, name)
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

    def _write(self, **changes: Any) -> None:
        assert self._record
        check_writer(self._mirror, self._me)
        record = replace(self._record, **changes).sign()
        self._mirror.write(record)
        self._record = record

    def _sign(self, ended: bool = False) -> None:
        if self._record is not None:
            check_writer(self._mirror, self._me)
            self._mirror.write(self._record.sign(ended=ended))

    def _fail(self, error: Exception) -> None:
        self.failures += 1
        self.problem = str(error)
        if self.failures == 1 or self.failures % _SAID_EVERY == 0:
            logger.error(
                "MIRRORING FAILED (%d in a row); training goes on, and its own checkpoints are intact: %s",
                *(self.failures, error),
            )
        self._note()

    def _note(self) -> None:
        """Leaves word in the run folder of how far the mirror is."""
        with contextlib.suppress(OSError):
            note(self._folder, step=self.step, failures=self.failures, problem=self.problem, time=round(time.time(), 3))


def run_files(folder: RunFolder, exported: bool = False) -> dict[str, Path]:
    """Returns the files of a run that are copied beside a checkpoint, by their place in the run folder.

    exported: the weights alone too
    """
    paths = [folder.recipe_file, folder.record_file, folder.metrics, folder.ledger, folder.bad_samples]
    paths += sorted(folder.tensorboard.glob("events.out.tfevents.*"))
    if exported:
        paths += [
            path for kind in ("last", "best") for path in (folder.model(kind), folder.model(kind).with_suffix(".md"))
        ]
    return {str(path.relative_to(folder.path)): path for path in paths if path.is_file()}


def object_name(place: str) -> str:
    """Returns the name in the mirror of a file of the run folder: without folders, and without odd characters."""
    return re.sub(r"[^A-Za-z0-9_.=+-]", "_", place.rpartition("/")[2])
