"""The format of a checkpoint, and the only place that knows it. Imports no torch.

    checkpoints/step-00000500/
        manifest.json     step, world size, parameter groups, recipe, and a digest of every other file and of itself
        rank-00000.pt     this rank's partition of the fp32 master weights and of the optimizer's state
        rank-00001.pt     …
        buffers.pt        what is not trained and the same on all ranks, of a model that has such

ZeRO flattens each parameter group and cuts the flat vector into equal parts, one per rank, padding the last. So the
files of a checkpoint are consecutive pieces of one vector per group and per kind of state, and a rank of any other
world size copies from them the interval that is its own.

A kind is nothing but a name in `kinds`: the average of the weights is one more, and is read and resharded as the others
are. Buffers, as batch normalisation has them, and frozen parameters stand once, written by rank 0, their names and
shapes in the manifest; where there is an average of the weights, there is one of them. A program that does not know of
buffers would lose them, so a manifest that has some says version 2, and any other 1.
"""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, InstanceOf, Strict, TypeAdapter, ValidationError

from crate_dist.errors import UserError
from crate_dist.files import write_whole
from crate_dist.run.checkpoints import checkpoint_names

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
BUFFERS = "buffers.pt"
HEAD = "head.linear.weight"
"""The weight that has one row per class."""
WEIGHTS = "fp32"
"""The kind of state that every checkpoint has: the master weights."""
AVERAGE = "ema"
"""The kind that one has where the recipe asks for it: the moving average of the weights."""

_MOST_PADDING = 4096  # elements per rank; DeepSpeed pads to two
_BYTES = 4  # per element of the fp32 weights, of which the files hold all

_Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
_StepOrNone = Annotated[int, Field(strict=True, ge=-1, lt=2**63)]
_Number = Annotated[float, Strict()]
_Text = InstanceOf[str]  # names of folders may be no Unicode, which a plain str would have to be


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written or used; the message names the file and what would do."""


@dataclass(frozen=True)
class GroupLayout:
    """The flat vector of one parameter group: names and shapes in order, nothing between them."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    names: Sequence[_Text]
    shapes: Sequence[Sequence[_Count]]

    @property
    def sizes(self) -> list[int]:
        """Elements per parameter."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def numel(self) -> int:
        """Elements of the whole group, without padding."""
        return sum(self.sizes)


@dataclass(frozen=True)
class Progress:
    """The state of a run beside its weights. The data pipeline's whole state is the step.

    step: optimizer steps done; evaluated_at: step of the last evaluation, -1 for none
    best_top1: best validation accuracy so far, in per cent, of the average of the weights where there is one
    best_step: when it was reached
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    step: _Count
    evaluated_at: _StepOrNone = -1
    best_top1: _Number = -1.0
    best_step: _StepOrNone = -1
    metrics: Mapping[str, _Number] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredFile:
    """Size and SHA-256 of a file beside the manifest."""

    bytes: _Count
    sha256: _Text


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of manifest.json; the first versions did not say what has a default here.

    world_size: ranks that saved it; tenure: which holder of the run folder did, see run/lock.py
    groups, partitions: the flat vectors, and elements of each per rank; kinds: of state, one vector per group each
    files: by name; recipe: the values that decide the result
    buffers: shapes by name; empty: the model has none
    classes: ids in the order of the labels; class_names: the same for people
    data: facts that tell one split from another, see data/identity.py
    """

    world_size: Annotated[int, Field(strict=True, gt=0)]
    tenure: _Count = 0
    progress: Progress
    groups: Sequence[GroupLayout]
    partitions: Sequence[_Count]
    kinds: Sequence[_Text]
    files: Mapping[str, StoredFile]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    buffers: Mapping[_Text, Sequence[_Count]] = field(default_factory=dict)
    classes: Sequence[_Text] | None = None
    data: Mapping[str, Mapping[str, Any] | None] | None = None
    class_names: Sequence[_Text] | None = None

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shapes of the weights, by parameter name."""
        return {name: [*shape] for group in self.groups for name, shape in zip(group.names, group.shapes, strict=True)}

    @property
    def num_classes(self) -> int | None:
        """Classes of the model's head; None where it has no head that is known here."""
        head = self.buffers.get(HEAD) or self.shapes.get(HEAD, [])  # among the buffers where it is not trained
        return head[0] if len(head) == 2 else None


_PLAIN = TypeAdapter(Manifest)


def rank_file(rank: int) -> str:
    """Returns the name of one rank's file."""
    return f"rank-{rank:05d}.pt"


def manifest_digest(said: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of all that a manifest says but this."""
    rest = {key: value for key, value in said.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes a manifest with its version and its digest. Raises OSError."""
    said = {"version": FORMAT_VERSION, **asdict(manifest)}
    if not manifest.buffers:
        del said["buffers"]
        said["version"] = 1
    write_whole(folder / MANIFEST, json.dumps({**said, "digest": manifest_digest(said)}, indent=1))


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a checkpoint.

    Raises CheckpointError for one that no save of this version wrote, with its name; OSError when it cannot be read.
    """
    path = folder / MANIFEST
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        if said["version"] not in range(1, FORMAT_VERSION + 1):
            problem = (
                f"has format {said['version']!r}, which this program does not know: it reads 1 to {FORMAT_VERSION}"
            )
        elif said["digest"] != manifest_digest(said):
            problem = "does not have the digest in it"
        else:
            manifest = _PLAIN.validate_python(said)
            contradiction = _contradiction(manifest)
            if not contradiction:
                return manifest
            problem = f"cannot be right: {contradiction}"
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        where = ".".join(map(str, wrong["loc"]))
        problem = f"cannot be right: {where} is {reprlib.repr(wrong['input'])}: {wrong['msg']}"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        problem = f"is damaged ({type(error).__name__}: {error})"
    raise CheckpointError(f"{path} {problem}")


def newest_manifest(checkpoints: Path) -> Manifest | None:
    """Reads the manifest of the newest checkpoint in a folder that has a whole one; None where there is none.

    For a first look: whether its other files are whole is found out when the run starts.

    Raises OSError when the folder cannot be listed.
    """
    for name in reversed(checkpoint_names(checkpoints)):
        try:
            return read_manifest(checkpoints / name)
        except (OSError, CheckpointError):
            continue
    return None


def other_head(run: Path, manifest: Manifest, classes: int) -> str:
    """Says why a checkpoint cannot go on with data of so many classes, whatever is accepted; "" where it can."""
    asked = manifest.recipe.get("model.num_classes") or classes
    there = asked if manifest.num_classes is None else manifest.num_classes
    if there == asked:
        return ""
    return (
        f"{run} has a model of {there} classes, and the data have {asked}: it goes on with data of the classes that it "
        f"knows alone. Give these, or begin a new run from its weights, with another --run-dir and --init-from {run}"
    )


def _contradiction(manifest: Manifest) -> str:
    """Says what no save writes, though each value alone might be right; "" for nothing."""
    files, ranks, beside = manifest.files, manifest.world_size, {BUFFERS} if manifest.buffers else set()
    if len(files) != ranks + len(beside) or files.keys() != _files_of(ranks) | beside:
        return f"it does not list the files of {ranks} ranks" + (f", and {BUFFERS}" if beside else "")
    if WEIGHTS not in manifest.kinds:
        return f"kinds are {manifest.kinds!r}, expected names with {WEIGHTS} among them"
    if len(manifest.groups) != len(manifest.partitions):
        return "groups and partitions are no lists of one length"
    for number, (group, partition) in enumerate(zip(manifest.groups, manifest.partitions, strict=True)):
        if len(group.names) != len(group.shapes):
            return f"groups.{number} has other names than shapes"
        least = -(-group.numel // ranks)
        if not max(least, 1) <= partition <= least + _MOST_PADDING:
            return f"partitions.{number} is {partition!r}, and {ranks} of them are to hold {group.numel} elements"
    names = [*manifest.buffers, *(name for group in manifest.groups for name in group.names)]
    if len(set(names)) < len(names):
        return "two of its parameters have the same name"
    elements, there = sum(group.numel for group in manifest.groups), sum(file.bytes for file in files.values())
    if elements * _BYTES > there:
        return f"groups have {elements} elements, more than files of {there} bytes hold"
    return ""


def _files_of(ranks: int) -> set[str]:
    return set(map(rank_file, range(ranks)))
