"""Saves while training goes on: copied to host memory, written beside, published by one rename."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist

from crate_dist.checkpoint.format import (
    BUFFERS,
    WEIGHTS,
    CheckpointError,
    GroupLayout,
    Manifest,
    Progress,
    StoredFile,
    rank_file,
    write_manifest,
)
from crate_dist.checkpoint.loading import Buffers, Checkpoint, RankState, list_checkpoints
from crate_dist.distributed import gather_objects, host_group
from crate_dist.files import sync_folder
from crate_dist.run.checkpoints import UNFINISHED, checkpoint_names, note_published, step_name, unfinished_name
from crate_dist.run.lock import ALONE, Tenure
from crate_dist.world import World

logger = logging.getLogger(__name__)

_LEAVE_S = 60.0


@dataclass(frozen=True)
class Saved:
    """A finished save: the seconds that training stood still for it, and those that it took in all."""

    step: int
    stall_s: float
    total_s: float


class Saver:
    """A thread that saves beside the training, one save at a time.

    The ranks' writers agree with each other over a gloo group of their own, in threads, so that they meet neither the
    device nor the collectives of the step.

    keep: newest checkpoints that are kept, beside the best one
    max_failures: saves that may fail in a row, each with a loud warning, before the run stops
    failures: saves that have failed in a row, up to the last one that was waited for
    tenure: of rank 0 in the run folder; the others write nothing under a final name
    damaged: names of checkpoints that were found to be so
    published: called on rank 0 after each save, for whoever does something with it; returns at once
    """

    def __init__(
        self,
        folder: Path,
        layouts: Sequence[GroupLayout],
        world: World,
        keep: int,
        max_failures: int,
        tenure: Tenure = ALONE,
        damaged: Collection[str] = (),
        published: Callable[[], None] = lambda: None,
    ) -> None:
        self._published = published
        self._folder, self._layouts, self._world, self._tenure = folder, layouts, world, tenure
        self._damaged = damaged
        self._keep, self._max_failures = keep, max_failures
        self._group = host_group()
        if world.is_main:
            _sweep(folder, tenure)
        self._host: RankState = {}
        self._host_buffers: Buffers = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.failures = 0
        self._saved: Saved | None = None

    def save(self, state: RankState, progress: Progress, buffers: Buffers | None = None, **about: Any) -> Saved | None:
        """Copies the state and returns, leaving the rest to a thread; returns the save before it if that succeeded.

        A collective only in that it waits for the save before. Raises CheckpointError as `wait` does.
        """
        before = self.wait()
        began = time.perf_counter()
        self._copy(state)
        if self._world.is_main:
            kinds = (buffers or {}).items()
            self._host_buffers = {kind: {n: t.to("cpu", copy=True) for n, t in of.items()} for kind, of in kinds}
        stall_s = time.perf_counter() - began
        self._thread = threading.Thread(
            target=self._write, args=(progress, about, began, stall_s), name="saver", daemon=True
        )
        self._thread.start()
        return before

    def wait(self) -> Saved | None:
        """Waits for the save that is under way; returns it, or None when there was none or it failed.

        Raises CheckpointError: on all ranks, when too many saves in a row have failed.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        if self._error is None:
            self.failures = 0
            return self._saved
        if not isinstance(self._error, CheckpointError):
            raise self._error
        self.failures += 1
        if self.failures >= self._max_failures:
            raise CheckpointError(f"{self.failures} saves in a row have failed, the last one: {self._error}")
        logger.error(
            "SAVING FAILED (%d of at most %d in a row); training goes on, the checkpoints before are intact. %s",
            self.failures,
            self._max_failures,
            self._error,
        )
        return None

    def leave(self) -> None:
        """Lets the save that is under way end, for a minute, before an error ends the training."""
        if self._thread is not None:
            self._thread.join(_LEAVE_S)

    def _copy(self, state: RankState) -> None:
        """Copies into buffers that are kept: memory is found once, at the first save, and pinned for a GPU."""
        for kind, parts in state.items():
            if kind not in self._host:
                self._host[kind] = [torch.empty(p.shape, dtype=p.dtype, pin_memory=p.is_cuda) for p in parts]
            for host, part in zip(self._host[kind], parts, strict=True):
                host.copy_(part, non_blocking=True)
        if any(part.is_cuda for parts in state.values() for part in parts):
            torch.cuda.synchronize()

    def _write(self, progress: Progress, about: dict[str, Any], began: float, stall_s: float) -> None:
        self._error = None
        try:
            to = self._folder, self._host, self._layouts, progress, self._world, self._group, self._tenure
            saved = publish(*to, self._host_buffers, **about)
            if self._world.is_main:
                prune(self._folder, self._keep, progress, self._tenure, self._damaged)
                self._published()
            self._saved = Saved(progress.step, stall_s, time.perf_counter() - began)
            logger.info("saved %s in %.1f s, %.2f s of them standing still", saved.path, self._saved.total_s, stall_s)
        except BaseException as error:  # told to the training at the next save
            self._error = error


def publish(
    folder: Path,
    state: RankState,
    layouts: Sequence[GroupLayout],
    progress: Progress,
    world: World,
    group: dist.ProcessGroup | None = None,
    tenure: Tenure = ALONE,
    buffers: Buffers | None = None,
    **about: Any,
) -> Checkpoint:
    """Writes a checkpoint and makes it visible by one rename, after every rank has agreed. A collective of `group`.

    state: partitions on the CPU; tenure, buffers: rank 0's; about: recipe, classes and data, as Manifest has them

    Raises
    ------
    CheckpointError: on every rank, when any of them could not write; nothing is left under a final name
    LostTheRun: on rank 0, when another holder of the run folder has taken over
    """
    final, beside, no_folder = folder, _unfinished(folder, tenure, f"{progress.step:08d}"), ""
    if world.is_main:
        try:
            tenure.check()
            final = folder / _free_name(folder, progress.step)
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        except OSError as error:
            no_folder = f"rank 0: {error}"
    # Nobody writes before the folder is fresh; its name and the final one are rank 0's.
    final, beside, no_folder, number = gather_objects((final, beside, no_folder, tenure.number), group)[0]
    if no_folder:
        raise CheckpointError(f"checkpoint of step {progress.step} was not saved: {no_folder}")
    outcomes = gather_objects(_write_file(beside / rank_file(world.rank), state), group)
    failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(outcomes) if text]
    files = {rank_file(rank): file for rank, (file, _) in enumerate(outcomes) if file}
    if world.is_main and buffers and not failures:
        file, text = _write_file(beside / BUFFERS, buffers)
        if file:
            files[BUFFERS] = file
        else:
            failures = [f"rank 0: {text}"]
    manifest = Manifest(
        world_size=world.world_size,
        tenure=number,
        progress=progress,
        groups=layouts,
        partitions=[part.numel() for part in state[WEIGHTS]],
        kinds=sorted(state),
        files=files,
        buffers={name: [*tensor.shape] for name, tensor in (buffers or {}).get(WEIGHTS, {}).items()},
        **about,
    )
    if not failures and world.is_main:
        try:
            write_manifest(beside, manifest)
            sync_folder(beside)
            tenure.check()
            beside.replace(final)  # of the same step there may be another, which goes when this one stands
            sync_folder(folder)
            note_published(folder, progress.step)
        except OSError as error:
            failures = [f"rank 0: {error}"]
    failures = gather_objects(failures, group)[0]
    if failures:
        if world.is_main:
            shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(f"checkpoint of step {progress.step} was not saved: " + "; ".join(failures))
    return Checkpoint(final, manifest)


def prune(folder: Path, keep: int, progress: Progress, tenure: Tenure = ALONE, damaged: Collection[str] = ()) -> None:
    """Removes all checkpoints but the newest `keep` up to this step, and the best one. On one rank.

    Only what it has opened is removed: not what cannot be read, at the moment or at all, nor what a later version has
    written; nor what is of a later step, or of a later holder of the folder.

    damaged: names of those that are known to be so: they are none of the newest, and go when a whole one is as new

    Raises LostTheRun when another holder of the run folder has taken over.
    """
    try:
        there = [saved for saved in list_checkpoints(folder) if saved.step <= progress.step]
        newest = {saved.step: saved for saved in there if saved.path.name not in damaged}  # the last of each step
        recent = sorted(newest)[-keep:]
        for saved in there:
            old = saved.step in newest or saved.step < min(recent, default=0)
            stays = saved is newest.get(saved.step) and saved.step in (*recent, progress.best_step)
            if old and not stays and saved.manifest.tenure <= tenure.number:
                tenure.check()
                _remove(saved.path, tenure)
    except (OSError, CheckpointError) as error:
        logger.warning("cannot remove a checkpoint that is not needed any more: %s", error)
    _sweep(folder, tenure)


def _unfinished(folder: Path, tenure: Tenure, name: str) -> Path:
    return folder / unfinished_name(tenure.number, tenure.token, name)


def _free_name(folder: Path, step: int) -> str:
    """Returns a name for a checkpoint of this step.

    There may be a damaged one, which loading has passed over, or one of before an evaluation: it is not touched before
    the new one stands, so that there is a whole one at every moment.
    """
    there = set(checkpoint_names(folder))
    return next(name for count in itertools.count() if (name := step_name(step, count)) not in there)


def _remove(path: Path, tenure: Tenure) -> None:
    """Renames a checkpoint first: a removal that is interrupted leaves nothing that looks like one."""
    doomed = _unfinished(path.parent, tenure, path.name)
    path.replace(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sweep(folder: Path, tenure: Tenure) -> None:
    """Removes what interrupted saves and removals have left: ours, and that of holders before us."""
    try:
        leftovers = [name for name in os.listdir(folder) if name.startswith(UNFINISHED)]
    except OSError:
        return
    for name in leftovers:
        number, token, _ = ([*name.removeprefix(UNFINISHED).split("-", 2), "", ""])[:3]
        older = not token or not number.isdecimal() or int(number) < tenure.number
        if older or token == tenure.token:
            tenure.check()
            shutil.rmtree(folder / name, ignore_errors=True)


class _Digesting:
    """A file that knows the SHA-256 of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self.sha256.update(data)
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()


def _write_file(path: Path, state: RankState | Buffers) -> tuple[StoredFile | None, str]:
    """Writes tensors and returns (the file, "") or (None, what went wrong)."""
    try:
        with path.open("wb") as file:
            digesting = _Digesting(file)
            torch.save(state, digesting)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        return StoredFile(digesting.bytes, digesting.sha256.hexdigest()), ""
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        return None, f"{path}: {error}"
