"""Checkpoints: published whole or not at all, found by looking, resharded while loading.

    checkpoints/step-00000500/
        manifest.json     step, world size, layout, recipe, and a digest of every other file
        rank-00000.pt     this rank's partition of the fp32 master weights and of the optimizer's state
        rank-00001.pt     …

ZeRO flattens each parameter group and cuts the flat vector into equal parts, one per rank, padding the last. So the
files of a checkpoint are consecutive pieces of one vector per group and per kind of state, and a rank of any other
world size copies from them the interval that is its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from crate_dist.distributed import World, all_agree, gather_objects
from crate_dist.run import write_whole

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_PREFIX = "step-"
_UNFINISHED = ".unfinished-"

logger = logging.getLogger(__name__)

RankState = dict[str, list[torch.Tensor]]
"""Kind of state ("fp32", "exp_avg", …) -> this rank's flat partition of it, one per parameter group."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or used; the message names the file and what would do."""


@dataclass(frozen=True)
class Layout:
    """How one parameter group is flattened: names and shapes in order, nothing between them."""

    names: Sequence[str]
    shapes: Sequence[Sequence[int]]

    @property
    def sizes(self) -> list[int]:
        """Elements per parameter."""
        return [int(torch.Size(shape).numel()) for shape in self.shapes]

    @property
    def numel(self) -> int:
        """Elements of the whole group, without padding."""
        return sum(self.sizes)


@dataclass(frozen=True)
class Progress:
    """What a run knows beside its weights. The data pipeline's whole state is the step.

    optimizer_steps: updates done, as the optimizer counts them; evaluated_at: step of the last evaluation, -1 for none
    best_top1: best validation accuracy so far, in per cent; best_step: when it was reached
    """

    step: int = 0
    evaluated_at: int = -1
    best_top1: float = -1.0
    best_step: int = -1
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint, its manifest read."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps that went into it."""
        return int(self.manifest["progress"]["step"])

    @property
    def progress(self) -> Progress:
        """What the run knew when it was saved."""
        return Progress(**self.manifest["progress"])

    @property
    def world_size(self) -> int:
        """Ranks that saved it."""
        return int(self.manifest["world_size"])

    @property
    def layouts(self) -> list[Layout]:
        """One per parameter group."""
        return [Layout(**group) for group in self.manifest["groups"]]

    def damaged(self, files: Sequence[str] | None = None) -> str | None:
        """What is wrong with `files` (all of them by default) against the manifest; None when nothing is."""
        for name in self.manifest["files"] if files is None else files:
            expected = self.manifest["files"][name]
            path = self.path / name
            try:
                if path.stat().st_size != expected["bytes"]:
                    return f"{path} has {path.stat().st_size} bytes, not {expected['bytes']}"
                if _digest(path) != expected["sha256"]:
                    return f"{path} does not have the digest in its manifest"
            except OSError as error:
                return f"{path}: {error.strerror}"
        return None

    def reader(self) -> StateReader:
        """Access to the state as whole vectors."""
        return StateReader(self)

    def weights(self) -> dict[str, torch.Tensor]:
        """The fp32 master weights by parameter name."""
        reader = self.reader()
        weights: dict[str, torch.Tensor] = {}
        for group, layout in enumerate(self.layouts):
            start = 0
            for name, shape, size in zip(layout.names, layout.shapes, layout.sizes, strict=True):
                flat = torch.empty(size)
                reader.copy("fp32", group, start, flat)
                weights[name] = flat.view(*shape)
                start += size
        return weights


class StateReader:
    """Reads any interval of a group's flat vectors out of the files of all ranks, which it maps, not loads."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._files: dict[int, RankState] = {}

    def copy(self, kind: str, group: int, start: int, out: torch.Tensor) -> None:
        """Fills the 1-d `out` with [start, start + len(out)) of the vector; what lies behind its end becomes 0."""
        out.zero_()
        partition = int(self._checkpoint.manifest["partitions"][group])
        stop = min(start + out.numel(), self._checkpoint.layouts[group].numel)
        position = start
        while position < stop:
            rank, offset = divmod(position, partition)
            count = min(partition - offset, stop - position)
            piece = self._rank(rank)[kind][group][offset : offset + count]
            out[position - start : position - start + count].copy_(piece)
            position += count

    def _rank(self, rank: int) -> RankState:
        if rank not in self._files:
            path = self._checkpoint.path / rank_file(rank)
            self._files[rank] = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
        return self._files[rank]


def rank_file(rank: int) -> str:
    """The name of one rank's file."""
    return f"rank-{rank:05d}.pt"


def publish(
    folder: Path,
    state: RankState,
    layouts: Sequence[Layout],
    progress: Progress,
    world: World,
    device: torch.device,
    **about: Any,
) -> Checkpoint:
    """Writes a checkpoint and makes it visible by one rename, after every rank has agreed. A collective.

    Raises
    ------
    CheckpointError: on every rank, when any of them could not write; nothing is left under a final name
    """
    final = folder / f"{_PREFIX}{progress.step:08d}"
    beside = folder / f"{_UNFINISHED}{progress.step:08d}"
    if world.is_main:
        shutil.rmtree(beside, ignore_errors=True)
        with contextlib.suppress(OSError):  # told below, by all ranks, when they cannot write into it
            beside.mkdir(parents=True)
    all_agree(True, device)  # nobody writes before the folder is fresh
    entry, failure = _write_rank_file(beside, state, world.rank)
    outcomes = gather_objects((entry, failure))
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
    if not failures and world.is_main:
        try:
            write_whole(beside / MANIFEST, json.dumps(manifest, indent=1))
            _sync(beside)
            shutil.rmtree(final, ignore_errors=True)  # a damaged one of this step, which loading has passed over
            beside.replace(final)
            _sync(folder)
        except OSError as error:
            failures = [f"rank 0: {error}"]
    failures = gather_objects(failures)[0]
    if failures:
        if world.is_main:
            shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(f"checkpoint of step {progress.step} was not saved: " + "; ".join(failures))
    return Checkpoint(final, manifest)


def find_newest(folder: Path, world: World, device: torch.device) -> Checkpoint | None:
    """The newest checkpoint whose files have the digests of its manifest; None when the run has none. A collective.

    The ranks share the reading. A damaged one is reported and the one before it is tried.

    Raises
    ------
    CheckpointError: there are checkpoints, and none of them is whole
    """
    names = gather_objects(sorted((p.name for p in folder.glob(f"{_PREFIX}*")), reverse=True))[0]
    for name in names:
        checkpoint, problem = _open_or_why_not(folder / name)
        if checkpoint is not None:
            files = sorted(checkpoint.manifest["files"])
            problem = checkpoint.damaged(files[world.rank :: world.world_size]) or ""
        problems = [text for text in gather_objects(problem) if text]
        if checkpoint is not None and not problems:
            return checkpoint
        logger.warning("damaged checkpoint passed over: %s", "; ".join(dict.fromkeys(problems)))
    if names:
        raise CheckpointError(
            f"none of the {len(names)} checkpoints in {folder} is whole; to start over, move that folder away"
        )
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint folder's manifest. Raises CheckpointError when it is none."""
    checkpoint, problem = _open_or_why_not(Path(path))
    if checkpoint is None:
        raise CheckpointError(problem)
    return checkpoint


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """The published checkpoints in a folder, oldest first; those whose manifest cannot be read are left out."""
    opened = (_open_or_why_not(path)[0] for path in sorted(folder.glob(f"{_PREFIX}*")))
    return [checkpoint for checkpoint in opened if checkpoint is not None]


def prune(folder: Path, keep: int, best_step: int) -> None:
    """Removes all but the newest `keep` and the best one, and what an interrupted save left. On one rank."""
    checkpoints = list_checkpoints(folder)
    for checkpoint in checkpoints[:-keep]:
        if checkpoint.step != best_step:
            # Renamed first: a removal that is interrupted leaves nothing that looks like a checkpoint.
            doomed = folder / f"{_UNFINISHED}{checkpoint.path.name}"
            checkpoint.path.replace(doomed)
    for leftover in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _write_rank_file(folder: Path, state: RankState, rank: int) -> tuple[dict[str, Any], str]:
    path = folder / rank_file(rank)
    try:
        with path.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": _digest(path)}, ""
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        return {}, f"{path}: {error}"


def _open_or_why_not(path: Path) -> tuple[Checkpoint | None, str]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["version"] != FORMAT_VERSION:
            return None, f"{path} has format {manifest['version']}, this program reads {FORMAT_VERSION}"
        checkpoint = Checkpoint(path, manifest)
        ranks = {rank_file(rank) for rank in range(checkpoint.world_size)}
        if set(manifest["files"]) != ranks or len(checkpoint.layouts) != len(manifest["partitions"]):
            return None, f"{path / MANIFEST} does not list the files of {checkpoint.world_size} ranks"
        Progress(**manifest["progress"])
    except OSError as error:
        return None, f"{path / MANIFEST}: {error.strerror}"
    except (ValueError, KeyError, TypeError) as error:
        return None, f"{path / MANIFEST} is damaged ({error})"
    return checkpoint, ""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
