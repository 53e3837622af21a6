"""What a checkpoint's manifest.json says, and what it cannot: the format, without torch.

version, progress (step, …), world_size, tenure; groups (names and shapes) and partitions (elements per rank) of the
flat vectors, kinds of them; files with bytes and sha256; recipe, data, classes; digest, of all of this
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crate_dist.run.folder import checkpoint_names

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_MOST_PADDING = 4096  # elements per rank; DeepSpeed pads to two
_BYTES = 4  # per element of the fp32 weights, of which the files hold all


@dataclass(frozen=True)
class Layout:
    """How one parameter group is flattened: names and shapes in order, nothing between them."""

    names: Sequence[str]
    shapes: Sequence[Sequence[int]]

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
    """What a run knows beside its weights. The data pipeline's whole state is the step.

    optimizer_steps: updates done, as the optimizer counts them; evaluated_at: step of the last evaluation, -1 for none
    best_top1: best validation accuracy so far, in per cent; best_step: when it was reached
    """

    step: int = 0
    evaluated_at: int = -1
    best_top1: float = -1.0
    best_step: int = -1
    metrics: Mapping[str, float] = field(default_factory=dict)


def rank_file(rank: int) -> str:
    """The name of one rank's file."""
    return f"rank-{rank:05d}.pt"


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all that a manifest says but this."""
    said = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """What a manifest says. Raises ValueError for one that no save wrote, with its name; OSError."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["version"] != FORMAT_VERSION:
            problem = f"has format {manifest['version']}, this program reads {FORMAT_VERSION}"
        elif manifest["digest"] != manifest_digest(manifest):
            problem = "does not have the digest in it"
        else:
            problem = f"cannot be right: {wrong}" if (wrong := _malformed(manifest)) else ""
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        problem = f"is damaged ({type(error).__name__}: {error})"
    if problem:
        raise ValueError(f"{path} {problem}")
    return manifest


def newest_manifest(checkpoints: Path) -> Mapping[str, Any] | None:
    """What the newest checkpoint in a folder says, without torch; None where there is none with a whole manifest.

    For a first look: whether its other files are whole is found out when the run starts.

    Raises OSError when the folder cannot be listed.
    """
    for name in reversed(checkpoint_names(checkpoints)):
        try:
            return read_manifest(checkpoints / name / MANIFEST)
        except (OSError, ValueError):
            continue
    return None


def _malformed(manifest: Mapping[str, Any]) -> str:
    """What no save writes, in a manifest whose digest is right; "" for nothing.

    Raises KeyError and TypeError where something is missing or there is more than there should be.
    """
    world_size, files, progress = manifest["world_size"], manifest["files"], manifest["progress"]
    if not _is_count(world_size) or world_size < 1:
        return f"world_size is {world_size!r}, expected a whole number from 1 on"
    if (
        not isinstance(files, dict)
        or len(files) != world_size
        or files.keys() != set(map(rank_file, range(len(files))))
    ):
        return f"it does not list the files of {world_size} ranks"
    for name, entry in files.items():
        if not _is_count(entry["bytes"]) or not isinstance(entry["sha256"], str):
            return f"files.{name} is {entry!r}, expected bytes and a sha256"
    if not _are_names(manifest["kinds"]) or "fp32" not in manifest["kinds"]:
        return f"kinds are {manifest['kinds']!r}, expected names with fp32 among them"
    if not _is_count(manifest.get("tenure", 0)):
        return f"tenure is {manifest['tenure']!r}, expected a whole number"
    groups, partitions = manifest["groups"], manifest["partitions"]
    if not isinstance(groups, list) or not isinstance(partitions, list) or len(groups) != len(partitions):
        return "groups and partitions are no lists of one length"
    names: list[str] = []
    elements = 0
    for number, (group, partition) in enumerate(zip(groups, partitions, strict=True)):
        layout = Layout(**group)
        if not all(isinstance(part, list) for part in (layout.names, layout.shapes, *layout.shapes)):
            return f"groups[{number}] has no lists of names and shapes"
        if len(layout.names) != len(layout.shapes) or not all(isinstance(name, str) for name in layout.names):
            return f"groups[{number}] has other names than shapes"
        if not all(_is_count(length) for shape in layout.shapes for length in shape):
            return f"groups[{number}] has a shape that is none"
        names += layout.names
        numel = layout.numel
        elements += numel
        least = -(-numel // world_size)
        if not _is_count(partition) or not max(least, 1) <= partition <= least + _MOST_PADDING:
            return f"partitions[{number}] is {partition!r}, and {world_size} of them are to hold {numel} elements"
    if len(set(names)) < len(names):
        return "two of its parameters have the same name"
    if elements * _BYTES > (there := sum(entry["bytes"] for entry in files.values())):
        return f"groups have {elements} elements, more than files of {there} bytes hold"
    data, classes = manifest.get("data") or {}, manifest.get("classes")
    if not isinstance(data, dict) or not all(isinstance(data.get(split) or {}, dict) for split in ("train", "val")):
        return "data are no facts of train and val"
    if classes is not None and not _are_names(classes):
        return "classes are no list of names"
    known = Progress(**progress)
    if not _is_count(progress["step"]) or not all(type(at) is int for at in (known.evaluated_at, known.best_step)):
        return f"progress has a step that is none: {progress!r}"
    numbers = [known.best_top1, *known.metrics.values()] if isinstance(known.metrics, dict) else [None]
    if not all(type(number) in (int, float) for number in numbers):
        return f"progress has metrics that are no numbers: {progress!r}"
    return ""


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
