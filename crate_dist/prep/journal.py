"""The folder of a split while it is written: whose it is, and what in it is finished.

What stands there, beside the shards:

    conversion.json   what is converted and how; a conversion that continues must be the same one
    shards.jsonl      one line per finished shard: its digest, what was counted, what was left out
    .*.tmp            shards in the making; removed when the conversion ends or continues
    index.json        written last: the split is whole
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crate_dist.data.index import INDEX_JSON, INDEX_ROWS, Shard, ShardError, ShardIndex
from crate_dist.files import write_whole
from crate_dist.prep.folders import first_few
from crate_dist.prep.images import ImageOptions
from crate_dist.prep.program import explained
from crate_dist.prep.shards import JournalEntry, ShardPlan, is_temporary, shard_names

CONVERSION_JSON = "conversion.json"
JOURNAL = "shards.jsonl"
_FORMAT_VERSION = 1
_MOST_SAMPLES = 10**9
_OPTIONS = {
    "seed": "--seed",
    "shard_samples": "--shard-samples",
    "short_side": "--short-side",
    "quality": "--quality",
    "verify": "--verify-images",
}


@dataclass(frozen=True)
class ConversionIdentity:
    """The input and options that decide the bytes: conversions of equal identity are the same one."""

    samples: int
    source: str
    classes: str
    seed: int
    shard_samples: int
    short_side: int | None
    quality: int | None
    verify: bool

    @classmethod
    def of(cls, plan: ShardPlan, classes: Sequence[str], image_options: ImageOptions) -> ConversionIdentity:
        """Returns the identity of a planned conversion."""
        return cls(
            len(plan.samples),
            plan.samples.digest(),
            digest_of_classes(classes),
            plan.seed,
            plan.shard_samples,
            image_options.short_side,
            image_options.quality,
            image_options.verify,
        )


class SplitFolder:
    """The folder of a split, for one conversion. Nothing is written before start()."""

    def __init__(self, plan: ShardPlan, identity: ConversionIdentity) -> None:
        self.path, self.plan, self.identity = plan.folder, plan, identity
        self._lock: int | None = None

    def check(self) -> None:
        """Raises ShardError when the folder is not this conversion's: it holds something else or another conversion."""
        try:
            names = sorted(os.listdir(self.path))
        except FileNotFoundError:
            return
        except OSError as error:
            raise ShardError(f"cannot use {self.path}: {error.strerror}") from error
        before = read_conversion(self.path)
        foreign = [name for name in names if not name.startswith(".")]
        if before is not None:
            own = set(self.plan.names())
            foreign = [name for name in foreign if name.endswith(".tar") and name not in own]
            self._compare(before)
        if foreign:
            raise ShardError(
                f"{self.path} holds something else: {first_few(foreign, 3)}; "
                "give --out a folder of its own, or move these away"
            )

    def complete(self) -> ShardIndex | None:
        """Returns the index of a whole split, which names all shards as the journal does, each of its size on disk."""
        if not (self.path / INDEX_JSON).exists():
            return None
        finished = self.finished()
        try:
            index = ShardIndex.load(self.path)
            expected = [finished[name].shard for name in self.plan.names()]
            if list(index.shards) == [shard for shard in expected if shard.samples] and all(
                (self.path / shard.name).stat().st_size == shard.bytes for shard in index.shards
            ):
                return index
        except (OSError, KeyError, ShardError):
            pass
        return None

    def finished_bytes(self) -> int:
        """Returns the bytes of the finished shards."""
        return sum(entry.shard.bytes for entry in self.finished().values() if (self.path / entry.shard.name).exists())

    def start(self) -> None:
        """Takes the folder: locks it, writes the identity, removes what a dead conversion left. Raises ShardError."""
        with explained(f"cannot write to {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ShardError(f"another conversion is writing to {self.path}; wait for it, or end it") from None
            except OSError:  # not every network file system can lock
                pass
            for name in (INDEX_JSON, INDEX_ROWS):
                (self.path / name).unlink(missing_ok=True)
            self.remove_temporary()
            if not (self.path / CONVERSION_JSON).exists():
                (self.path / JOURNAL).unlink(missing_ok=True)
                whole = json.dumps({"version": _FORMAT_VERSION, **asdict(self.identity)}, indent=1)
                write_whole(self.path / CONVERSION_JSON, whole)

    def finished(self) -> dict[str, JournalEntry]:
        """Reads the shards that the journal knows, by name."""
        return read_journal(self.path)

    def record(self, finished: JournalEntry) -> None:
        """Adds a shard to the journal. Raises ShardError when the disk is full."""
        entry: Mapping[str, Any] = {
            "shard": asdict(finished.shard),
            "counted": dict(finished.counted),
            "skipped": list(finished.skipped),
        }
        path = self.path / JOURNAL
        with explained(f"cannot write {path}"), path.open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps(entry)}" if file.tell() else json.dumps(entry))
            file.flush()
            os.fsync(file.fileno())

    def remove_temporary(self) -> None:
        """Removes shards in the making; to be called when no worker is left."""
        for name in os.listdir(self.path):
            if is_temporary(name):
                (self.path / name).unlink(missing_ok=True)

    def release(self) -> None:
        """Unlocks the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _compare(self, before: Mapping[str, Any]) -> None:
        now = {"version": _FORMAT_VERSION, **asdict(self.identity)}
        if before == now:
            return
        differences = [
            f"{option} was {_shown(before.get(key))} and is {_shown(now[key])}"
            for key, option in _OPTIONS.items()
            if before.get(key) != now[key]
        ]
        if before.get("source") != now["source"] or before.get("classes") != now["classes"]:
            differences.append(f"--source had {before.get('samples')} images and has {now['samples']}, or other ones")
        raise ShardError(
            f"{self.path} holds another conversion: {'; '.join(differences) or 'of another version of this program'}. "
            "Repeat it with the options of then, or give another --out, or remove the folder to start anew"
        )


def digest_of_classes(classes: Sequence[str]) -> str:
    """Returns the SHA-256 of the class ids in their order."""
    return hashlib.sha256(json.dumps(list(classes)).encode()).hexdigest()


def read_conversion(folder: Path) -> dict[str, Any] | None:
    """Reads the conversion.json of a folder, None when there is none. Raises ShardError when it is damaged."""
    path = folder / CONVERSION_JSON
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ShardError(f"{path} is damaged ({error}); remove {folder} to convert anew") from error
    counts = [found.get(key) for key in ("samples", "shard_samples")] if isinstance(found, dict) else []
    if not counts or any(type(count) is not int or not 0 < count <= _MOST_SAMPLES for count in counts):
        raise ShardError(f"{path} is damaged, its counts of samples cannot be; remove {folder} to convert anew")
    return found


def read_journal(folder: Path) -> dict[str, JournalEntry]:
    """Reads the finished shards of a conversion, by name; none where there is no journal."""
    try:
        lines = (folder / JOURNAL).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    found = {}
    for line in lines:
        try:
            entry = json.loads(line)
            shard = Shard.read(entry["shard"])
            if isinstance(entry["counted"], dict) and isinstance(entry["skipped"], list):
                found[shard.name] = JournalEntry(shard, entry["counted"], entry["skipped"])
        except (ValueError, KeyError, TypeError):  # a line that a crash cut short: its shard is made again
            continue
    return found


def missing_shards(folder: Path) -> list[str]:
    """Names the shards that the conversion in a folder was to write and that do not stand there."""
    identity = read_conversion(folder)
    if identity is None:
        return []
    number = -(-int(identity["samples"]) // int(identity["shard_samples"]))
    empty = {name for name, entry in read_journal(folder).items() if not entry.shard.samples}
    return [name for name in shard_names(folder, number) if name not in empty and not (folder / name).exists()]


def _shown(value: Any) -> str:
    return "not given" if value is None or value is False else "given" if value is True else str(value)
