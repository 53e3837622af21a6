"""The parts of a conversion on many machines: who works on which, who has finished, who writes the index.

    OUT/.parts/003-of-016/   the lock of a part, while the conversion lasts; it says on which machine, in which job
    OUT/.parts/001-of-001/   that of the command without --part
    OUT/.parts/index/        the lock of the part that checks all shards and writes the index

A part needs nothing of the others but what all can see: the journals beside the shards. The last one to finish finds
all shards there, and makes the data set whole. Locks are leases (run/lock.py), since file systems that many machines
share often lock for one machine alone.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from crate_dist.data.index import INDEX_JSON, INDEX_ROWS, ShardError
from crate_dist.prep.folders import first_few
from crate_dist.prep.journal import CONVERSION_JSON, dashed, read_conversion, standing
from crate_dist.prep.program import explained, tell
from crate_dist.prep.shards import WHOLE, Part, shard_names
from crate_dist.run.lock import RunIsLocked, RunLock, holder_of
from crate_dist.wording import counted, duration

_LOCKS = ".parts"
_SILENT_S = 120
_NAME = re.compile(r"([0-9]{3,4})-of-([0-9]{3,4})")


@contextmanager
def held(out: Path, part: Part) -> Iterator[None]:
    """Holds a part, so that no other process works on it.

    Raises ShardError: one does already, or one works on a part of another division, or on the whole.
    """
    others = [(path, _named(other)) for path, other in _begun(out) if other.of != part.of]
    with ThreadPoolExecutor(max(len(others), 1)) as pool:  # each that died on another machine takes a minute
        list(pool.map(lambda other: _check_ended(*other), others))
    with ExitStack() as stack:
        path = out / _LOCKS / dashed(part)
        with explained(f"cannot write to {out}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            _take(stack, path, _named(part))
        yield


@contextmanager
def merging(out: Path) -> Iterator[bool]:
    """Yields whether this process is the one that writes the index; another may be doing so already."""
    with ExitStack() as stack:
        try:
            _take(stack, out / _LOCKS / "index", "the index")
        except ShardError as refusal:
            tell(f"all parts are finished; {refusal}")
            yield False
            return
        yield True


def clear(out: Path) -> None:
    """Removes the locks of a conversion that is whole."""
    shutil.rmtree(out / _LOCKS, ignore_errors=True)


def waits_for(part: Part, missing: Mapping[str, Sequence[str]]) -> list[str]:
    """Says which parts have not finished. missing: split -> its shards that are not there"""
    shards = {name: int(name.removesuffix(".tar").rpartition("-")[2]) for names in missing.values() for name in names}
    others = sorted({number % part.of + 1 for number in shards.values()})
    left = first_few(map(str, others), 16)
    return [
        f"the data set is not whole yet: {counted(len(shards), 'shard')} of {first_few(missing)} missing, of "
        f"{'part' if len(others) == 1 else 'parts'} {left} of {part.of}; the last part to finish writes the index"
    ]


def progress(out: Path) -> tuple[list[str], bool]:
    """Returns (a line for each part: how far it is, who works on it and where; whether the data set is whole).

    The parts are those of the division that was last at work, and those of others that are at work. A shard counts that
    stands with the size that its journal says. Raises ShardError where no conversion was begun.
    """
    splits = sorted(path.parent for path in out.glob(f"*/{CONVERSION_JSON}")) if out.is_dir() else []
    if not splits:
        raise ShardError(f"no conversion was begun in {out}")
    names, finished = {}, {}
    for split in splits:
        identity = read_conversion(split)
        assert identity is not None
        names[split] = shard_names(split, -(-int(identity["samples"]) // int(identity["shard_samples"])))
        finished[split] = standing(split)
    all_stand = all(finished[split].issuperset(names[split]) for split in splits)
    indexed = all((split / name).exists() for split in splits for name in (INDEX_JSON, INDEX_ROWS))
    begun = _begun(out)
    of = max(((_touched(path), part.of) for path, part in begun), default=(0, 1))[1]
    parts = [Part(number, of) for number in range(1, of + 1)]
    lines = []
    for part in parts + [part for path, part in begun if part.of != of and _at_work(path)]:
        own = [(split, name) for split in splits for name in part.share(names[split])]
        done = sum(name in finished[split] for split, name in own)
        if of > 1 or not (all_stand and indexed):
            state = _state(out / _LOCKS / dashed(part), done == len(own), part)
            lines.append(f"part {part}: {done:,} of {counted(len(own), 'shard')}, {state}")
    if all_stand and indexed:
        return [*lines, f"{out} is whole: {', '.join(split.name for split in splits)}"], True
    index = out / _LOCKS / "index"
    holder = holder_of(index)
    if _at_work(index):
        lines.append(f"the index: {holder}")
    elif all_stand and not any(_at_work(path) for path, _ in begun):
        was = f"{_said(index)}; " if holder else ""
        lines.append(f"the index: {was}give the command of any part again, it writes the index")
    elif indexed:
        lines.append("the index: shards that it names are missing or changed; give the same command again")
    else:
        lines.append("the index: when all parts are finished")
    return lines, False


def _state(lock: Path, finished: bool, part: Part) -> str:
    """Says how it stands with a part. finished: all its shards stand"""
    if finished:
        return "finished"
    return _said(lock) or ("not begun" if part != WHOLE else "not finished")


def _said(lock: Path) -> str:
    """Says who holds a lock, or held it and when; nothing where nobody did."""
    holder = holder_of(lock)
    if holder is None:
        return ""
    if holder.surely_gone():
        return f"stopped, was {holder}"
    return str(holder) if _at_work(lock) else f"no sign of life for {duration(_silent_s(lock))}, was {holder}"


def _at_work(lock: Path) -> bool:
    """Tells whether a lock's holder may live."""
    holder = holder_of(lock)
    return holder is not None and not holder.surely_gone() and _silent_s(lock) <= _SILENT_S


def _silent_s(lock: Path) -> float:
    return time.time() - _touched(lock)


def _touched(lock: Path) -> float:
    """Returns the time of the last sign of life, each of which is a file in the lock; long ago where there is none."""
    with suppress(OSError):
        return lock.stat().st_mtime
    return 0.0


def _named(part: Part) -> str:
    return "the conversion" if part == WHOLE else f"part {part}"


def _begun(out: Path) -> list[tuple[Path, Part]]:
    """Lists (lock, part) of all parts that were begun."""
    found = [(path, _NAME.fullmatch(path.name)) for path in sorted((out / _LOCKS).glob("*"))]
    return [(path, Part(int(match[1]), int(match[2]))) for path, match in found if match]


def _check_ended(path: Path, what: str) -> None:
    """Raises ShardError while somebody works on a part."""
    with ExitStack() as stack:
        _take(stack, path, what, brief=True)


def _take(stack: ExitStack, path: Path, what: str, brief: bool = False) -> None:
    """Takes a lock for as long as the stack lasts. Raises ShardError that says who holds it."""
    holder = holder_of(path)
    if holder and not holder.surely_gone() and not holder.surely_alive():
        tell(f"{what} was begun by {holder}; up to a minute, to see whether it lives")
    try:
        stack.enter_context(RunLock(path, brief=brief))
    except RunIsLocked:
        at_work = holder_of(path)
        if path.name == dashed(WHOLE):
            raise ShardError(
                f"another conversion is writing to {path.parents[1]}, {at_work}; wait for it, or end it"
            ) from None
        raise ShardError(f"{what} is written by {at_work}; wait for it, or end it") from None
