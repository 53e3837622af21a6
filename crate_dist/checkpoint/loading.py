"""Finds the newest valid checkpoint by looking, and reshards it while it is loaded; format.py says what it is.

On a shared file system what cannot be seen for a moment is not gone: reading is tried again, and in the end refused,
before an older checkpoint is taken or a run starts from step 0.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from crate_dist.checkpoint.format import (
    AVERAGE,
    BUFFERS,
    MANIFEST,
    WEIGHTS,
    CheckpointError,
    Manifest,
    Progress,
    rank_file,
    read_manifest,
)
from crate_dist.distributed import gather_objects
from crate_dist.run.checkpoints import checkpoint_names, published_file, published_step, step_name
from crate_dist.world import World

_PAUSES_S: tuple[float, ...] = (0.5, 2.0)
T = TypeVar("T")

logger = logging.getLogger(__name__)

RankState = dict[str, list[torch.Tensor]]
"""Kind of state ("fp32", "exp_avg", …) -> this rank's flat partition of it, one per parameter group."""
Buffers = dict[str, dict[str, torch.Tensor]]
"""Kind ("fp32": the model's own, "ema": their average) -> buffers by name, the same on all ranks."""


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint, its manifest read."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Optimizer steps that went into it."""
        return self.manifest.progress.step

    @property
    def progress(self) -> Progress:
        """The state of the run beside its weights."""
        return self.manifest.progress

    def damaged(self) -> str | None:
        """Says what is wrong with the files, or keeps them from being read; None when nothing does."""
        try:
            return self.damage(list(self.manifest.files)) or None
        except OSError as error:
            return f"{error.filename}: {error.strerror}"

    def damage(self, files: Sequence[str]) -> str:
        """Holds some of the files against the manifest, and says what is wrong or missing; "" for nothing.

        Raises OSError when one cannot be read, which says nothing about it.
        """
        for name in files:
            expected, path = self.manifest.files[name], self.path / name
            try:
                size = patiently(path.stat).st_size
                if size != expected.bytes:
                    return f"{path} has {size} bytes, not {expected.bytes}"
                if patiently(lambda path=path: _digest(path)) != expected.sha256:  # type: ignore[misc]
                    return f"{path} does not have the digest in its manifest"
            except FileNotFoundError as error:
                return f"{path}: {error.strerror}"
        return ""

    def reader(self) -> StateReader:
        """Gives access to the state as whole vectors."""
        return StateReader(self)

    def weights(self, kind: str = WEIGHTS) -> dict[str, torch.Tensor]:
        """Reads the fp32 master weights by parameter name, or another kind of state; views on one vector per group.

        Of the weights and their average the buffers too: a state dict of the model.
        """
        reader = self.reader()
        weights = reader.buffers(kind) if kind in (WEIGHTS, AVERAGE) else {}
        for number, group in enumerate(self.manifest.groups):
            flat = torch.empty(group.numel)
            reader.copy(kind, number, 0, flat)
            parts = zip(group.names, group.shapes, flat.split(group.sizes), strict=True)
            weights |= {name: part.view(tuple(shape)) for name, shape, part in parts}
        return weights


class StateReader:
    """Reads any interval of a group's flat vectors out of the files of all ranks, which it maps, not loads."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._files: dict[int, RankState] = {}

    def copy(self, kind: str, group: int, start: int, out: torch.Tensor) -> None:
        """Fills the 1-d `out` with [start, start + len(out)) of the vector; what lies behind its end becomes 0."""
        out.zero_()
        manifest = self._checkpoint.manifest
        partition, stop = manifest.partitions[group], min(start + out.numel(), manifest.groups[group].numel)
        position = start
        while position < stop:
            rank, offset = divmod(position, partition)
            count = min(partition - offset, stop - position)
            piece = self._rank(rank)[kind][group][offset : offset + count]
            out[position - start : position - start + count].copy_(piece)
            position += count

    def buffers(self, kind: str) -> dict[str, torch.Tensor]:
        """Reads the model's buffers by name, or their average, which is of the kind AVERAGE."""
        shapes, path = self._checkpoint.manifest.buffers, self._checkpoint.path / BUFFERS
        if not shapes:
            return {}
        said = _load(path)
        found = said.get(kind) if isinstance(said, dict) else None
        there = {n: [*getattr(t, "shape", "?")] for n, t in found.items()} if isinstance(found, dict) else {}
        if found is None or there != {name: [*shape] for name, shape in shapes.items()}:
            raise CheckpointError(f"{path} does not hold the buffers of {kind} that its manifest names")
        return dict(found)

    def _rank(self, rank: int) -> RankState:
        if rank not in self._files:
            path = self._checkpoint.path / rank_file(rank)
            state = _load(path)
            self._check(path, state)
            self._files[rank] = state
        return self._files[rank]

    def _check(self, path: Path, state: Any) -> None:
        """Raises CheckpointError for other shapes: copying would stretch a single number over a whole vector."""
        lengths = [torch.Size([length]) for length in self._checkpoint.manifest.partitions]
        for kind in self._checkpoint.manifest.kinds:
            parts = state.get(kind) if isinstance(state, dict) else None
            if not isinstance(parts, list) or [getattr(part, "shape", None) for part in parts] != lengths:
                raise CheckpointError(f"{path} does not hold the partitions of {kind} that its manifest names")


def _load(path: Path) -> Any:
    try:
        return torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path} holds more than tensors, and is not opened") from None


def find_newest(folder: Path, world: World, damaged: list[str] | None = None) -> Checkpoint | None:
    """Finds the newest checkpoint whose files have the digests of its manifest; None when the run has none.

    A collective: the ranks share the reading. A damaged one is reported, its name added to `damaged`, and the one
    before it is tried.

    Raises
    ------
    CheckpointError: there are checkpoints, and none of them is whole; or there are, or were, and they cannot be seen
    """
    names: list[str] = []
    problem, number = "", None
    if world.is_main:
        try:
            names = _names_unless_lost(folder)
        except CheckpointError as error:
            problem, number = _text_and_errno(error)
    names, problem, number = gather_objects((names, problem, number))[0]
    if problem:
        raise CheckpointError(problem) from (OSError(number, problem) if number else None)
    for name in reversed(names):
        checkpoint, problem, number = None, "", None
        try:
            checkpoint = open_checkpoint(folder / name)
            problem = checkpoint.damage(sorted(checkpoint.manifest.files)[world.rank :: world.world_size])
        except CheckpointError as error:
            problem, number = _text_and_errno(error)
        except OSError as error:
            problem, number = f"{folder / name} cannot be read: {error.strerror}", error.errno
        said = gather_objects((problem, number))
        for text, number in said:
            if number is not None:  # which is no reason to go back to an older one
                raise CheckpointError(text) from OSError(number, text)
        problems = [text for text, _ in said if text]
        if checkpoint is not None and not problems:
            return checkpoint
        logger.warning("damaged checkpoint passed over: %s", "; ".join(dict.fromkeys(problems)))
        if damaged is not None:
            damaged.append(name)
    if names:
        raise CheckpointError(
            f"none of the {len(names)} checkpoints in {folder} is whole; --start-over sets the run aside"
        )
    return None


def _text_and_errno(error: CheckpointError) -> tuple[str, int | None]:
    """Returns what other ranks are told of an error: its text, and the number of the OSError behind it, or None."""
    return str(error), error.__cause__.errno if isinstance(error.__cause__, OSError) else None


def _names_unless_lost(folder: Path) -> list[str]:
    """Lists the checkpoints, oldest first. Raises CheckpointError when they cannot be seen, or were there once."""
    names = _names(folder)
    try:
        step = patiently(lambda: published_step(folder))
    except OSError as error:
        raise CheckpointError(f"cannot see whether there were checkpoints in {folder}: {error.strerror}") from error
    except ValueError as error:
        if names:
            return names
        noted = published_file(folder)
        raise CheckpointError(f"there is no checkpoint in {folder}, and {noted} is damaged ({error})") from None
    if step is not None and not names:
        raise CheckpointError(
            f"there is no checkpoint in {folder}, but {published_file(folder)} says that this run has published one "
            f"of step {step}: is something not mounted, or was the folder emptied? Nothing was started, since it would "
            "start at step 0. Bring the checkpoints back, or give --start-over, which sets what is left of the run "
            "aside"
        )
    if step is not None and names[-1] < step_name(step):
        logger.warning("%s says step %d, but the newest is %s", published_file(folder), step, names[-1])
    return names


def _names(folder: Path) -> list[str]:
    try:
        return patiently(lambda: checkpoint_names(folder))
    except OSError as error:
        raise CheckpointError(f"cannot see which checkpoints there are in {folder}: {error.strerror}") from error


def patiently(look: Callable[[], T]) -> T:
    """Returns what `look` does, tried again for a few seconds while that raises OSError."""
    for pause_s in _PAUSES_S:
        try:
            return look()
        except FileNotFoundError:
            raise
        except OSError as error:
            logger.warning("%s; trying again in %g s", error, pause_s)
            time.sleep(pause_s)
    return look()


def open_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint folder's manifest.

    Raises CheckpointError when it is none; its cause is an OSError when it cannot be read, which says nothing about it.
    """
    try:
        return Checkpoint(path, patiently(lambda: read_manifest(path)))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path / MANIFEST}: {error.strerror}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Opens the published checkpoints in a folder, oldest first; names those that cannot be opened in the log.

    Raises CheckpointError when the folder cannot be listed.
    """
    opened = []
    for name in _names(folder):
        try:
            opened.append(open_checkpoint(folder / name))
        except CheckpointError as error:
            logger.warning("left alone: %s", error)
    return opened


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
