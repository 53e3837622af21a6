"""The folder of a split while it is written: whose it is, and what in it is finished.

What stands there, beside the shards:

    conversion.json   what is converted and how; a conversion that continues must be the same one
    shards.jsonl      one line per finished shard: its digest, what was counted, what was left out
    shards-003-of-016.jsonl  the same of one of several machines, until the split is whole
    .*.tmp            shards in the making; removed when the conversion ends or continues
    index.json        written last: the split is whole
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crate_dist.data.index import INDEX_JSON, INDEX_ROWS, Shard, ShardError, ShardIndex
from crate_dist.files import write_first, write_whole
from crate_dist.prep.folders import first_few
from crate_dist.prep.images import ImageOptions
from crate_dist.prep.program import explained
from crate_dist.prep.shards import WHOLE, JournalEntry, Part, ShardPlan, shard_names, unfinished_of

CONVERSION_JSON = "conversion.json"
JOURNAL = "shards.jsonl"
_JOURNALS = "shards-*.jsonl"
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
    """The folder of a split, for one conversion or one part of it. Nothing is written outside of `taken`."""

    def __init__(self, plan: ShardPlan, identity: ConversionIdentity, part: Part = WHOLE) -> None:
        self.path, self.plan, self.identity, self.part = plan.folder, plan, identity, part
        self._journal = self.path / (JOURNAL if part == WHOLE else _JOURNALS.replace("*", dashed(part)))

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

    def missing(self, part: Part = WHOLE) -> list[str]:
        """Names the shards of a part that no journal knows, or that do not stand with the size of then."""
        there = standing(self.path)
        return [name for name in part.share(self.plan.names()) if name not in there]

    def finished_bytes(self) -> int:
        """Returns the bytes of the finished shards."""
        return sum(entry.shard.bytes for entry in self.finished().values() if (self.path / entry.shard.name).exists())

    @contextmanager
    def taken(self, part: Part) -> Iterator[None]:
        """Locks the folder, writes the identity if it is not there, removes what the dead have left of a part's shards.

        Raises ShardError: another conversion works here, or was begun meanwhile.
        """
        with explained(f"cannot write to {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with explained(f"cannot write to {self.path}"):
                self._lock(lock)
                if not (self.path / CONVERSION_JSON).exists():
                    self._journal.unlink(missing_ok=True)
                    whole = json.dumps({"version": _FORMAT_VERSION, **asdict(self.identity)}, indent=1)
                    write_first(self.path / CONVERSION_JSON, whole)
                self.check()  # again: another machine's may have been written since
                self._remove_temporary(part)
            yield
        finally:
            self._remove_temporary(part)
            os.close(lock)

    def forget_index(self) -> None:
        """Removes an index that is not right any more, before shards are written."""
        for name in (INDEX_JSON, INDEX_ROWS):
            (self.path / name).unlink(missing_ok=True)

    def finished(self) -> dict[str, JournalEntry]:
        """Reads the shards that the journal knows, by name."""
        return read_journal(self.path)

    def record(self, finished: JournalEntry) -> None:
        """Adds a shard to the journal. Raises ShardError when the disk is full."""
        line = json.dumps(_as_json(finished))
        with explained(f"cannot write {self._journal}"), self._journal.open("a", encoding="utf-8") as file:
            file.write(f"\n{line}" if file.tell() else line)
            file.flush()
            os.fsync(file.fileno())

    def join_journals(self) -> None:
        """Makes one journal of those of all parts; to be called when the index stands."""
        parts = list(self.path.glob(_JOURNALS))
        if parts:
            finished = self.finished()
            lines = [json.dumps(_as_json(finished[name])) for name in self.plan.names()]
            write_whole(self.path / JOURNAL, "\n".join(lines))
        for path in parts:
            path.unlink(missing_ok=True)

    def _lock(self, folder: int) -> None:
        """Keeps out other conversions on this machine; parts of one conversion do not keep out each other."""
        try:
            fcntl.flock(folder, (fcntl.LOCK_EX if self.part == WHOLE else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShardError(f"another conversion is writing to {self.path}; wait for it, or end it") from None
        except OSError:  # not every network file system can lock
            pass

    def _remove_temporary(self, part: Part) -> None:
        """Removes shards in the making; to be called when no worker is left."""
        own = None if part == WHOLE else set(part.share(self.plan.names()))
        for name in os.listdir(self.path):
            target = unfinished_of(name)
            if target is not None and (own is None or target in own):
                (self.path / name).unlink(missing_ok=True)

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
    """Reads the finished shards of a conversion, all its parts, by name; none where there is no journal."""
    lines: list[str] = []
    for path in (*sorted(folder.glob(_JOURNALS)), folder / JOURNAL):
        with suppress(FileNotFoundError):  # another machine may just have joined them
            lines += path.read_text(encoding="utf-8").splitlines()
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


def standing(folder: Path) -> set[str]:
    """Names the shards that a journal knows and that stand with the size of then, or have no image and so no file."""
    sizes = {}
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                sizes[entry.name] = entry.stat().st_size
    finished = {name: entry.shard for name, entry in read_journal(folder).items()}
    return {name for name, shard in finished.items() if not shard.samples or sizes.get(name) == shard.bytes}


def missing_shards(folder: Path) -> list[str]:
    """Names the shards that the conversion in a folder was to write and that do not stand there."""
    identity = read_conversion(folder)
    if identity is None:
        return []
    number = -(-int(identity["samples"]) // int(identity["shard_samples"]))
    empty = {name for name, entry in read_journal(folder).items() if not entry.shard.samples}
    return [name for name in shard_names(folder, number) if name not in empty and not (folder / name).exists()]


def dashed(part: Part) -> str:
    """Says 003-of-016, for names of files."""
    return f"{part.number:03d}-of-{part.of:03d}"


def _as_json(entry: JournalEntry) -> dict[str, Any]:
    return {"shard": asdict(entry.shard), "counted": dict(entry.counted), "skipped": list(entry.skipped)}


def _shown(value: Any) -> str:
    return "not given" if value is None or value is False else "given" if value is True else str(value)
