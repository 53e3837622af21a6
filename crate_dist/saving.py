"""Saving while training goes on: copied to host memory, written beside, published by one rename."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist

from crate_dist.checkpoint import (
    FORMAT_VERSION,
    MANIFEST,
    PREFIX,
    UNFINISHED,
    Checkpoint,
    CheckpointError,
    Layout,
    Progress,
    RankState,
    list_checkpoints,
    manifest_digest,
    rank_file,
)
from crate_dist.distributed import World, gather_objects
from crate_dist.run import write_whole

logger = logging.getLogger(__name__)

_LEAVE_S = 60.0


@dataclass(frozen=True)
class Saved:
    """A finished save: how long training stood still for it, and how long it took in all."""

    step: int
    stall_s: float
    total_s: float


class Saver:
    """Saves beside the training, one save at a time.

    The ranks' writers agree with each other over a gloo group of their own, in threads, so that they meet neither the
    device nor the collectives of the step.

    keep: newest checkpoints that are kept, beside the best one
    max_failures: saves that may fail in a row, each with a loud warning, before the run stops
    failures: saves that have failed in a row, up to the last one that was waited for
    """

    def __init__(self, folder: Path, layouts: Sequence[Layout], world: World, keep: int, max_failures: int) -> None:
        self._folder, self._layouts, self._world = folder, layouts, world
        self._keep, self._max_failures = keep, max_failures
        self._group = dist.new_group(backend="gloo")
        if world.is_main:
            _sweep(folder)
        self._host: RankState = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.failures = 0
        self._saved: Saved | None = None

    def save(self, state: RankState, progress: Progress, **about: Any) -> Saved | None:
        """Copies `state` and returns, leaving the rest to a thread; gives the save before it, when that succeeded.

        A collective only in that it waits for the save before. Raises CheckpointError as `wait` does.
        """
        before = self.wait()
        began = time.perf_counter()
        self._copy(state)
        stall_s = time.perf_counter() - began
        self._thread = threading.Thread(
            target=self._write, args=(progress, about, began, stall_s), name="saver", daemon=True
        )
        self._thread.start()
        return before

    def wait(self) -> Saved | None:
        """Waits for the save that is under way; gives it when it succeeded, None when there was none or it failed.

        Raises
        ------
        CheckpointError: on all ranks, when too many saves in a row have failed
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
        """Before an error ends the training: lets the save that is under way end, for a while."""
        if self._thread is not None:
            self._thread.join(_LEAVE_S)

    def _copy(self, state: RankState) -> None:
        """Into buffers that are kept: memory is found once, at the first save, and pinned for a GPU."""
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
            saved = publish(self._folder, self._host, self._layouts, progress, self._world, self._group, **about)
            if self._world.is_main:
                prune(self._folder, self._keep, progress)
            self._saved = Saved(progress.step, stall_s, time.perf_counter() - began)
            logger.info("saved %s in %.1f s, %.2f s of them standing still", saved.path, self._saved.total_s, stall_s)
        except BaseException as error:  # told to the training at the next save
            self._error = error


def publish(
    folder: Path,
    state: RankState,
    layouts: Sequence[Layout],
    progress: Progress,
    world: World,
    group: dist.ProcessGroup | None = None,
    **about: Any,
) -> Checkpoint:
    """Writes a checkpoint and makes it visible by one rename, after every rank has agreed. A collective of `group`.

    state: partitions on the CPU; about: what else the manifest shall say

    Raises
    ------
    CheckpointError: on every rank, when any of them could not write; nothing is left under a final name
    """
    final = folder / f"{PREFIX}{progress.step:08d}"
    beside = folder / f"{UNFINISHED}{progress.step:08d}"
    no_folder = ""
    if world.is_main:
        shutil.rmtree(beside, ignore_errors=True)
        try:
            beside.mkdir(parents=True)
        except OSError as error:
            no_folder = f"rank 0: {error}"
    no_folder = gather_objects(no_folder, group)[0]  # nobody writes before the folder is fresh
    if no_folder:
        raise CheckpointError(f"checkpoint of step {progress.step} was not saved: {no_folder}")
    outcomes = gather_objects(_write_rank_file(beside / rank_file(world.rank), state), group)
    failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(outcomes) if text]
    manifest = {
        "version": FORMAT_VERSION,
        "world_size": world.world_size,
        "progress": asdict(progress),
        "groups": [asdict(layout) for layout in layouts],
        "partitions": [part.numel() for part in state["fp32"]],
        "kinds": sorted(state),
        "files": {rank_file(rank): entry for rank, (entry, _) in enumerate(outcomes)},
        **about,
    }
    manifest["digest"] = manifest_digest(manifest)
    if not failures and world.is_main:
        try:
            write_whole(beside / MANIFEST, json.dumps(manifest, indent=1))
            _sync(beside)
            _set_aside(final)  # a damaged one of this step, which loading has passed over, or one without evaluation
            beside.replace(final)
            _sync(folder)
        except OSError as error:
            failures = [f"rank 0: {error}"]
    failures = gather_objects(failures, group)[0]
    if failures:
        if world.is_main:
            shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(f"checkpoint of step {progress.step} was not saved: " + "; ".join(failures))
    return Checkpoint(final, manifest)


def prune(folder: Path, keep: int, progress: Progress) -> None:
    """Removes all but the newest `keep` up to this step, and the best one. On one rank.

    What claims a later step was damaged when the run resumed: it must not push out those which are whole.
    """
    checkpoints = [checkpoint for checkpoint in list_checkpoints(folder) if checkpoint.step <= progress.step]
    kept = {checkpoint.path for checkpoint in checkpoints[-keep:]}
    kept |= {checkpoint.path for checkpoint in checkpoints if checkpoint.step == progress.best_step}
    try:
        for path in folder.glob(f"{PREFIX}*"):
            if path not in kept:
                _set_aside(path)
    except OSError as error:
        logger.warning("cannot remove a checkpoint that is not needed any more: %s", error)
    _sweep(folder)


def _set_aside(path: Path) -> None:
    """Renames a checkpoint first: a removal that is interrupted leaves nothing that looks like one."""
    if path.exists():
        doomed = path.with_name(f"{UNFINISHED}{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.replace(doomed)


def _sweep(folder: Path) -> None:
    """Removes what interrupted saves and removals have left."""
    for leftover in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)


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


def _write_rank_file(path: Path, state: RankState) -> tuple[dict[str, Any], str]:
    """(entry for the manifest, "") or ({}, what went wrong)."""
    try:
        with path.open("wb") as file:
            digesting = _Digesting(file)
            torch.save(state, digesting)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        return {"bytes": digesting.bytes, "sha256": digesting.sha256.hexdigest()}, ""
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        return {}, f"{path}: {error}"


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
