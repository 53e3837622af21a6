"""Shards that stand already: building an index for those of others, checking them against the index they have."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand

from crate_dist.data.decode import BadImage
from crate_dist.data.identity import first_class_difference
from crate_dist.data.index import INDEX_JSON, INDEX_ROWS, Shard, ShardError, ShardIndex, read_meta
from crate_dist.prep.folders import first_few
from crate_dist.prep.images import check_decodes
from crate_dist.prep.journal import CONVERSION_JSON, missing_shards, read_conversion
from crate_dist.prep.pool import advance, run_parallel
from crate_dist.prep.program import progress_bar
from crate_dist.prep.tar import LabelRule, ShardScan, scan_shard

_NAMED = 10
"""Shards that one message names."""


@dataclass(frozen=True)
class Classes:
    """The classes of a data set. ids: position = label; names: for people, same length."""

    ids: Sequence[str]
    names: Sequence[str]

    @classmethod
    def read(cls, path: Path) -> Classes:
        """Reads one class a line: its id, and after a tab a name for people; also `n01440764 tench, Tinca tinca`.

        Raises ShardError.
        """
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ShardError(f"cannot read the classes in {path}: {error}") from error
        parts = [re.fullmatch(r"(n[0-9]{8}) +(.+)|([^\t]+)\t+(.+)", line) for line in lines]
        ids = [(part[1] or part[3]) if part else line for part, line in zip(parts, lines, strict=True)]
        names = [(part[2] or part[4]) if part else line for part, line in zip(parts, lines, strict=True)]
        if not ids or len(set(ids)) != len(ids):
            twice = next((name for name in ids if ids.count(name) > 1), "")
            raise ShardError(
                f"{path}: expected one class a line, " + (f"none twice, as {twice!r} is" if ids else "and it is empty")
            )
        return cls(ids, names)

    @classmethod
    def numbered(cls, number: int) -> Classes:
        """Returns classes of which nothing is known but their number."""
        ids = [str(label) for label in range(number)]
        return cls(ids, ids)


@dataclass(frozen=True)
class _ScanTask:
    path: Path
    label: LabelRule
    num_classes: int | None


@dataclass(frozen=True)
class _VerifyTask:
    path: Path
    shard: Shard
    rows: np.ndarray
    label: LabelRule
    num_classes: int
    decode: bool


def split_folders(root: Path) -> list[Path]:
    """Finds the folders of shards that a path means: itself, or those in it. Raises ShardError when there are none."""
    if not root.is_dir():
        raise ShardError(f"no folder {root}; give a folder of shards, or one that holds such folders")
    if _holds_shards(root):
        return [root]
    found = sorted(path for path in root.iterdir() if path.is_dir() and _holds_shards(path))
    if not found:
        raise ShardError(
            f"no shards (*.tar) in {root} nor in the folders in it; data_prep/image_folder.py makes some of images"
        )
    return found


def link_shards(pattern: str, folder: Path) -> Path:
    """Makes `folder` a split of the shards that a brace pattern names, by links. Returns `folder`.

    Raises ShardError when a shard is missing, two have one name, or the folder holds something else.
    """
    paths = [Path(name).expanduser().absolute() for name in braceexpand(pattern)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ShardError(f"{len(missing)} of the {len(paths)} shards that {pattern} names are missing: {missing[0]} …")
    links = {path.name: path for path in paths}
    if len(links) < len(paths):
        raise ShardError(f"{pattern} names two shards of the same name, which a folder cannot hold")
    folder.mkdir(parents=True, exist_ok=True)
    foreign = [p.name for p in folder.iterdir() if p.name not in (INDEX_JSON, INDEX_ROWS) and p.name not in links]
    if foreign:
        raise ShardError(f"--out {folder} holds something else: {first_few(sorted(foreign), 3)}")
    for name, path in links.items():
        link = folder / name
        if link.is_symlink() or not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(path)
    return folder


def build_indexes(
    folders: Sequence[Path], label: LabelRule, classes: Classes | None, workers: int, changed: bool = False
) -> list[ShardIndex]:
    """Scans all shards of all splits and writes their indexes, with one numbering of classes for all of them.

    Without `classes`, those that the splits' present indexes name are kept, and else they are numbered up to the
    largest label. changed: the shards need not be those that the present indexes name

    Raises ShardError, also where present indexes name other shards, or classes that are not the same; an index that
    stands is replaced only when all shards could be read.
    """
    before = [_present_index(folder, classes is not None) for folder in folders]
    for folder, meta in zip(folders, before, strict=True):
        missing = missing_shards(folder)
        if missing or (meta is None and read_conversion(folder) is not None):
            lost = f", {len(missing)} shards are missing, the first is {missing[0]}" if missing else ""
            raise ShardError(
                f"{folder} is a conversion that is not finished or was damaged{lost}; "
                "the command that converted it writes what is missing, and the index"
            )
        if meta and not changed:  # before hours of reading, what costs one look per shard
            _refuse_other_shards(folder, meta, {path.name: (path.stat().st_size, None) for path in _shards_in(folder)})
    classes = classes or _present_classes(folders, before)
    number = len(classes.ids) if classes else None
    paths = [path for folder in folders for path in _shards_in(folder)]
    scans: dict[Path, ShardScan] = {}
    with progress_bar("indexing", sum(path.stat().st_size for path in paths), "B") as bar:
        tasks = [_ScanTask(path, label, number) for path in paths]
        for path, scan in run_parallel(_scan, tasks, min(workers, len(tasks)), bar):
            scans[path] = scan
    if not any(len(scan.rows) for scan in scans.values()):
        raise ShardError(f"no samples in the shards of {', '.join(map(str, folders))}")
    if classes is None:
        classes = Classes.numbered(1 + max(int(scan.rows["label"].max()) for scan in scans.values() if len(scan.rows)))
    indexes = []
    for folder, meta in zip(folders, before, strict=True):
        ordered = [scans[path] for path in _shards_in(folder)]
        rows, shards = np.concatenate([scan.rows for scan in ordered]), [scan.shard for scan in ordered]
        if meta and not changed:
            _refuse_other_shards(folder, meta, {shard.name: (shard.bytes, shard.sha256) for shard in shards})
        made_by = {**(meta["made_by"] if meta else {"program": "data_prep/index.py"}), "label": str(label)}
        indexes.append(ShardIndex(folder, shards, rows, classes.ids, classes.names, made_by))
    for index in indexes:
        index.save()
    return indexes


def verify_split(index: ShardIndex, decode: bool, workers: int) -> Iterator[tuple[str, str]]:
    """Yields (shard, what is wrong with it) for each shard that is not what the index says, as it is found."""
    try:
        rule = LabelRule.parse(index.made_by.get("label", "cls"))
    except ValueError as error:
        raise ShardError(f"{index.root / INDEX_JSON} has a made_by.label that cannot be: {error}") from None
    ends = np.cumsum(index.shard_sizes)
    tasks = (
        _VerifyTask(
            index.root / shard.name, shard, np.array(index.rows[end - shard.samples : end]), rule,
            index.num_classes, decode,
        )
        for shard, end in zip(index.shards, ends, strict=True)
    )  # fmt: skip
    with progress_bar(index.root.name, sum(shard.bytes for shard in index.shards), "B") as bar:
        for name, problem in run_parallel(_verify, tasks, min(workers, len(index.shards)), bar):
            if problem is not None:
                yield name, problem


def _scan(task: _ScanTask) -> tuple[Path, ShardScan]:
    scan = scan_shard(task.path, task.label, task.num_classes)
    advance(scan.shard.bytes)
    return task.path, scan


def _verify(task: _VerifyTask) -> tuple[str, str | None]:
    problem = _problem(task)
    advance(task.shard.bytes)
    return task.shard.name, problem


def _problem(task: _VerifyTask) -> str | None:
    try:
        size = task.path.stat().st_size
        if size != task.shard.bytes:
            return f"{size:,} bytes, the index says {task.shard.bytes:,}"
        scan = scan_shard(task.path, task.label, task.num_classes)
    except FileNotFoundError:
        return "missing"
    except (OSError, ShardError) as error:
        return str(error)
    names = task.rows.dtype.names or ()  # without checksums in an index that was built before there were any
    differ = {name for name in names if not np.array_equal(scan.rows[name], task.rows[name])}
    if scan.shard.sha256 != task.shard.sha256:
        if differ != {"checksum"} or len(scan.rows) != len(task.rows):
            return "its sha256 is not the one in the index: some of its bytes have changed"
        changed = np.flatnonzero(scan.rows["checksum"] != task.rows["checksum"])
        where = f"the first is number {changed[0]}, at byte {task.rows['offset'][changed[0]]}"
        return f"its sha256 is not the one in the index: the bytes of {len(changed)} images have changed, {where}"
    if differ:
        return f"index.npy has another {', another '.join(sorted(differ))} for some image than the shard"
    return _undecodable(task) if task.decode else None


def _undecodable(task: _VerifyTask) -> str | None:
    with task.path.open("rb") as file:
        for number, row in enumerate(task.rows):
            advance(0)
            try:
                check_decodes(os.pread(file.fileno(), int(row["size"]), int(row["offset"])))
            except BadImage as error:
                return f"its image number {number}, at byte {row['offset']}: {error}"
    return None


def _shards_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def _holds_shards(folder: Path) -> bool:
    """Tells whether shards are in a folder, or are on their way into it."""
    return any((folder / name).is_file() for name in (INDEX_JSON, CONVERSION_JSON)) or bool(_shards_in(folder))


def _present_index(folder: Path, classes_given: bool) -> dict[str, Any] | None:
    """Reads the index.json that stands; None where there is none, or a damaged one that nothing is lost with."""
    path = folder / INDEX_JSON
    if not path.exists():
        return None
    try:
        return read_meta(path)
    except ShardError:
        raise
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        if classes_given or read_conversion(folder) is not None:
            return None
        raise ShardError(
            f"{path} is damaged ({error}), and the names of its classes are lost; give them with --classes, or remove "
            "it to have the classes numbered"
        ) from None
    except (ValueError, RecursionError) as error:
        what = f"{path} is not an index of this project ({error})"
        raise ShardError(f"{what}; move it away, its name is needed") from None


def _present_classes(folders: Sequence[Path], before: Sequence[Mapping[str, Any] | None]) -> Classes | None:
    """Returns the classes of the indexes that stand. Raises ShardError where two of them differ."""
    known = [(folder, meta) for folder, meta in zip(folders, before, strict=True) if meta]
    if not known:
        return None
    first, said = known[0]
    for folder, meta in known[1:]:
        for key in ("classes", "class_names"):
            if words := first_class_difference(said[key], meta[key], "in the one", "in the other"):
                raise ShardError(
                    f"{first / INDEX_JSON} and {folder / INDEX_JSON} have other {key}: {words}; "
                    "--classes says which are right, or index the folders one by one"
                )
    return Classes(said["classes"], said["class_names"])


def _refuse_other_shards(folder: Path, meta: Mapping[str, Any], found: Mapping[str, tuple[int, str | None]]) -> None:
    """Raises ShardError unless the shards are those of the index that stands: what is damaged would pass for sound.

    found: (bytes, sha256) by name, the latter None before it is known
    """
    known = {shard["name"]: shard for shard in meta["shards"]}
    words = [f"{name} is missing" for name in known if name not in found]
    words += [f"{name} is new" for name in found if name not in known]
    for name in (name for name in known if name in found):
        size, sha256 = found[name]
        if size != known[name]["bytes"]:
            words.append(f"{name} has {size:,} bytes instead of {known[name]['bytes']:,}")
        elif sha256 not in (None, known[name]["sha256"]):
            words.append(f"{name} has another sha256")
    if words:
        more = f"; and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
        raise ShardError(
            f"{folder} does not hold the shards that its index names: {'; '.join(words[:_NAMED])}{more}. "
            f"`python data_prep/verify.py {folder}` lists all that are damaged; if they were changed on purpose, "
            "--changed takes them as they are"
        )
