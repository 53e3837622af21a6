"""What a checkpoint is, how the newest valid one is found by looking, and how it is resharded while loading.

    checkpoints/step-00000500/
        manifest.json     step, world size, layout, recipe, and a digest of every other file and of itself
        rank-00000.pt     this rank's partition of the fp32 master weights and of the optimizer's state
        rank-00001.pt     …

ZeRO flattens each parameter group and cuts the flat vector into equal parts, one per rank, padding the last. So the
files of a checkpoint are consecutive pieces of one vector per group and per kind of state, and a rank of any other
world size copies from them the interval that is its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from crate_dist.checkpoint.format import MANIFEST, Layout, Progress, rank_file, read_manifest
from crate_dist.distributed import World, gather_objects
from crate_dist.files import write_whole
from crate_dist.run.folder import checkpoint_names

PUBLISHED = "published.json"
PREFIX = "step-"
UNFINISHED = ".unfinished-"
_HEAD = "head.linear.bias"

_PAUSES_S: tuple[float, ...] = (0.5, 2.0)
T = TypeVar("T")

logger = logging.getLogger(__name__)

RankState = dict[str, list[torch.Tensor]]
"""Kind of state ("fp32", "exp_avg", …) -> this rank's flat partition of it, one per parameter group."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or used; the message names the file and what would do."""


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
    def tenure(self) -> int:
        """Which holder of the run folder saved it; 0 for those of before that was written down. See lock.py."""
        return int(self.manifest.get("tenure", 0))

    @property
    def world_size(self) -> int:
        """Ranks that saved it."""
        return int(self.manifest["world_size"])

    @property
    def layouts(self) -> list[Layout]:
        """One per parameter group."""
        return [Layout(**group) for group in self.manifest["groups"]]

    def damaged(self) -> str | None:
        """What is wrong with the files against the manifest, or keeps them from being read; None when nothing does."""
        try:
            return self.damage(list(self.manifest["files"])) or None
        except OSError as error:
            return f"{error.filename}: {error.strerror}"

    def damage(self, files: Sequence[str]) -> str:
        """What is wrong with some of the files against the manifest, or that one is missing; "" when nothing is.

        Raises OSError when one cannot be read, which says nothing about it.
        """
        for name in files:
            expected, path = self.manifest["files"][name], self.path / name
            try:
                size = patiently(path.stat).st_size
                if size != expected["bytes"]:
                    return f"{path} has {size} bytes, not {expected['bytes']}"
                if patiently(lambda path=path: _digest(path)) != expected["sha256"]:  # type: ignore[misc]
                    return f"{path} does not have the digest in its manifest"
            except FileNotFoundError as error:
                return f"{path}: {error.strerror}"
        return ""

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

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Of the weights, by parameter name."""
        return {name: [*shape] for group in self.layouts for name, shape in zip(group.names, group.shapes, strict=True)}

    @property
    def num_classes(self) -> int:
        """That the model's head tells apart. Raises CheckpointError when it has none."""
        if len(shape := self.shapes.get(_HEAD, [])) != 1:
            raise CheckpointError(f"{self.path / MANIFEST} is not a CRATE's: {_HEAD} is no vector in it")
        return shape[0]

    def load_into(self, model: torch.nn.Module) -> None:
        """Copies the weights into a model. Raises CheckpointError unless they are its own, by name and shape."""
        saved, own = self.shapes, {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        if saved != own:
            name = next(name for name in {**own, **saved} if saved.get(name) != own.get(name))
            raise CheckpointError(
                f"{self.path / MANIFEST} does not fit the model of the run's recipe: {name} has the shape "
                f"{saved.get(name)} in the one and {own.get(name)} in the other"
            )
        model.load_state_dict(self.weights())


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
            try:
                state = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
            except pickle.UnpicklingError:
                raise CheckpointError(f"{path} holds more than tensors, and is not opened") from None
            self._check(path, state)
            self._files[rank] = state
        return self._files[rank]

    def _check(self, path: Path, state: Any) -> None:
        """Copying would stretch a single number over a whole vector."""
        lengths = [torch.Size([length]) for length in self._checkpoint.manifest["partitions"]]
        for kind in self._checkpoint.manifest["kinds"]:
            parts = state.get(kind) if isinstance(state, dict) else None
            if not isinstance(parts, list) or [getattr(part, "shape", None) for part in parts] != lengths:
                raise CheckpointError(f"{path} does not hold the partitions of {kind} that its manifest names")


def step_name(step: int, replacement: int = 0) -> str:
    """The name of a checkpoint's folder; `replacement` counts those of the same step."""
    return f"{PREFIX}{step:08d}" + (f".{replacement}" if replacement else "")


def find_newest(folder: Path, world: World, damaged: list[str] | None = None) -> Checkpoint | None:
    """The newest checkpoint whose files have the digests of its manifest; None when the run has none. A collective.

    The ranks share the reading. A damaged one is reported, its name added to `damaged`, and the one before it is tried.

    Raises
    ------
    CheckpointError: there are checkpoints, and none of them is whole; or there are, or were, and they cannot be seen
    """
    names, problem, number = gather_objects(_names_or_why_not(folder) if world.is_main else ([], "", None))[0]
    if problem:
        raise CheckpointError(problem) from (OSError(number, problem) if number else None)
    for name in reversed(names):
        checkpoint, unseen = None, None
        try:
            checkpoint, problem = _open_or_why_not(folder / name)
            if checkpoint is not None:
                files = sorted(checkpoint.manifest["files"])
                problem = checkpoint.damage(files[world.rank :: world.world_size])
        except OSError as error:  # which is no reason to go back to an older one
            unseen = error.errno
            problem = f"{folder / name} cannot be read: {error.strerror}"
        said = gather_objects((problem, unseen))
        for text, number in said:
            if number is not None:
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


def note_published(folder: Path, step: int) -> None:
    """Puts down, outside the folder of the checkpoints, that there is one."""
    write_whole(folder.with_name(PUBLISHED), json.dumps({"step": step}) + "\n")


def _names_or_why_not(folder: Path) -> tuple[list[str], str, int | None]:
    """Names of the checkpoints, oldest first; or a problem, and the number of the error that is its cause."""
    noted = folder.with_name(PUBLISHED)
    try:
        names = patiently(lambda: checkpoint_names(folder))
        try:
            step = int(json.loads(patiently(lambda: noted.read_text(encoding="utf-8")))["step"])
        except FileNotFoundError:
            return names, "", None
    except OSError as error:
        return [], f"cannot see which checkpoints there are in {folder}: {error.strerror}", error.errno
    except (ValueError, KeyError, TypeError) as error:
        return names, "" if names else f"there is no checkpoint in {folder}, and {noted} is damaged ({error})", None
    if not names:
        return (
            [],
            (
                f"there is no checkpoint in {folder}, but {noted} says that this run has published one of step {step}: "
                "is something not mounted, or was the folder emptied? Nothing was started, since it would start at "
                "step 0. Bring the checkpoints back, or give --start-over, which sets what is left of the run aside"
            ),
            None,
        )
    if names[-1] < step_name(step):
        logger.warning("%s says step %d, but the newest checkpoint there is %s", noted, step, names[-1])
    return names, "", None


def patiently(look: Callable[[], T]) -> T:
    """What `look` gives, tried again for a few seconds while that raises OSError: what cannot be seen is not gone."""
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
    """Reads a checkpoint folder's manifest. Raises CheckpointError when it is none."""
    try:
        checkpoint, problem = _open_or_why_not(Path(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if checkpoint is None:
        raise CheckpointError(problem)
    return checkpoint


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """The published checkpoints in a folder, oldest first; those that cannot be opened are named in the log.

    Raises CheckpointError when the folder cannot be listed.
    """
    try:
        names = patiently(lambda: checkpoint_names(folder))
    except OSError as error:
        raise CheckpointError(f"cannot see which checkpoints there are in {folder}: {error.strerror}") from error
    opened = []
    for name in names:
        try:
            checkpoint, problem = _open_or_why_not(folder / name)
        except OSError as error:
            checkpoint, problem = None, f"{folder / name} cannot be read: {error.strerror}"
        if checkpoint is None:
            logger.warning("left alone: %s", problem)
        else:
            opened.append(checkpoint)
    return opened


def _open_or_why_not(path: Path) -> tuple[Checkpoint | None, str]:
    """Raises OSError when the manifest cannot be read, which says nothing about it."""
    try:
        return Checkpoint(path, patiently(lambda: read_manifest(path / MANIFEST))), ""
    except FileNotFoundError as error:
        return None, f"{path / MANIFEST}: {error.strerror}"
    except ValueError as error:
        return None, str(error)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
