"""Mirrors a run in threads of rank 0, for which no step of the training ever waits."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from crate_dist.checkpoint.format import CheckpointError
from crate_dist.checkpoint.mirror.copying import Copier
from crate_dist.checkpoint.mirror.joining import NothingWhole, check_recipe, find, note, take
from crate_dist.checkpoint.mirror.record import MirrorError, MirrorRecord, RunMirror, Writer
from crate_dist.checkpoint.mirror.restoring import restore
from crate_dist.config import Recipe
from crate_dist.data.index import ShardError
from crate_dist.data.remote.fetch import RetryPolicy
from crate_dist.data.remote.store import STORING, Stopped
from crate_dist.run.checkpoints import newest_step
from crate_dist.run.folder import RunFolder
from crate_dist.run.lock import LostTheRun, Tenure

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.2
_SAID_EVERY = 10
"""Failures in a row of which one is told as an error, after the first."""
_LONGEST_PAUSE = 10
"""Times the seconds between two signs of life, after which a mirror that does not work is tried again at the latest."""


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
        self._copier: Copier | None = None
        self._exported = False
        self._due, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self.failures = 0
        self.problem = ""

    @property
    def step(self) -> int:
        """The step of the newest checkpoint that is whole there; -1: none, or none that is known of."""
        return self._copier.record.step if self._copier else -1

    def begin(self) -> None:
        """Takes the mirror over, and brings what the run folder does not have from there; then copies in a thread.

        Raises
        ------
        MirrorError: it holds another run, or another recipe's; another start writes there; or it does not work, or has
            no whole checkpoint, and neither has the run folder one to go on from
        ShardError: it has a newer checkpoint than the run folder, which cannot be fetched
        """
        try:
            self._begin()
        except BaseException:
            self._closing.set()
            self.leave()
            raise
        self._due.set()
        self._thread.start()

    def _begin(self) -> None:
        there, record = newest_step(self._folder.checkpoints), None
        try:
            record = find(self._mirror, self._folder, self._me)
            self._take(record)
        except ShardError as error:
            if max(there, record.step if record else -1) < 0:
                raise MirrorError(
                    f"{error}. Nothing is started: this run folder has no checkpoint, and the run may be in that "
                    "mirror. Bring it back, or --set checkpoint.mirror= starts without one"
                ) from error
            self._fail(error)
        if record and record.step > there:
            try:
                check_recipe(self._mirror, record, self._recipe, there)
                restore(self._mirror, record, self._folder, self._tenure)
            except NothingWhole as error:
                if there < 0:
                    raise
                logger.warning("%s. The run goes on from step %d of its folder, which is copied anew", error, there)

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
            if in_time and not self.problem:
                logger.info("step %d is in the mirror %s", self.step, self._mirror)
            else:
                logger.error(
                    "step %d is in the mirror %s, BUT NOT ALL THAT IS COPIED WITH IT, as the weights alone: %s",
                    *(self.step, self._mirror, self.problem or "there was no more time for it"),
                )
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

    def _take(self, record: MirrorRecord) -> None:
        record = take(self._mirror, self._folder, record, self._me)
        keep = self._recipe.checkpoint.keep
        self._copier = Copier(self._mirror, self._folder, record, keep, self._tenure.check)
        threading.Thread(target=self._give_signs, name="mirror's signs", daemon=True).start()

    def _give_signs(self) -> None:
        """Lets starts elsewhere see that this one lives; also while a checkpoint is copied, or restored."""
        while not self._closing.wait(self._me.beat_s):
            try:
                assert self._copier
                self._copier.sign()
            except Stopped:
                return
            except MirrorError:
                self._due.set()  # to be told by the other thread
                return
            except ShardError as error:
                logger.warning("no sign of life in the mirror: %s", error)

    def _work(self) -> None:
        try:
            while True:
                # While all is well nothing is due but what is published; else it is tried again.
                self._due.wait(self._me.beat_s * min(self.failures, _LONGEST_PAUSE) if self.failures else None)
                self._due.clear()
                closing = self._closing.is_set()
                try:
                    self._turn()
                except Stopped:
                    raise
                except (ShardError, CheckpointError, OSError) as error:
                    self._fail(error)
                if closing:
                    with contextlib.suppress(ShardError):
                        if self._copier:
                            self._copier.sign(ended=True)
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

    def _turn(self) -> None:
        """Copies what is not there yet."""
        self._tenure.check()
        if self._copier is None:
            record = find(self._mirror, self._folder, self._me)
            if record.step > newest_step(self._folder.checkpoints):
                raise MirrorError(f"{self._mirror} has step {record.step} of this run, which this start did not see")
            self._take(record)
        assert self._copier
        news = self._copier.copy(self._exported)
        if self.failures:
            logger.info("the mirror %s works again, after %d failures", self._mirror, self.failures)
        if news or self.failures:
            self.failures, self.problem = 0, ""
            self._note()

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
