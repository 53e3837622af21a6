"""Tells by a few digests whether data are those of a run: every checkpoint keeps them, every start compares.

They are of what decides the result: samples, their order, labels and classes. Not where shards lie or how they are
called, nor index.json itself, which names its maker: shards that are moved, or indexed anew, are the same data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crate_dist.data.index import ShardIndex

_ROWS_AT_ONCE = 2**20


@dataclass(frozen=True)
class Identity:
    """The identity of one split; digests are SHA-256, in hexadecimal.

    content: of the shards' own digests, in their order, and how many samples each has
    places: of every sample's offset and size; labels: of every sample's; classes: of the class ids, in their order
    """

    samples: int
    shards: int
    content: str
    places: str
    labels: str
    classes: str

    @classmethod
    def of(cls, index: ShardIndex) -> Identity:
        """Reads all rows: 0.2 s for ten million samples."""
        content, places, labels = (hashlib.sha256() for _ in range(3))
        for shard in index.shards:
            content.update(f"{shard.sha256} {shard.samples}\n".encode())
        for first in range(0, index.num_samples, _ROWS_AT_ONCE):
            rows = index.rows[first : first + _ROWS_AT_ONCE]
            for name, digest in (("offset", places), ("size", places), ("label", labels)):
                digest.update(rows[name].astype("<i8").tobytes())
        names = hashlib.sha256(json.dumps(list(index.classes)).encode())
        found = (digest.hexdigest() for digest in (content, places, labels, names))
        return cls(index.num_samples, len(index.shards), *found)

    @property
    def digest(self) -> str:
        """One digest of all of it."""
        return _digest(asdict(self))


@dataclass(frozen=True)
class DataIdentity:
    """The identity of a run's data. classes: ids in the order of the labels, of both splits."""

    train: Identity
    val: Identity | None
    classes: Sequence[str]

    @classmethod
    def of(cls, train: ShardIndex, val: ShardIndex | None) -> DataIdentity:
        """Reads the rows of two splits, which have the same classes."""
        return cls(Identity.of(train), Identity.of(val) if val else None, list(train.classes))

    @property
    def digest(self) -> str:
        """One digest of both splits."""
        return _digest(self.facts())

    def facts(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of the splits, beside the classes."""
        return {"train": asdict(self.train), "val": asdict(self.val) if self.val else None}

    def differences(
        self, facts: Mapping[str, Mapping[str, Any] | None] | None, classes: Sequence[str] | None
    ) -> dict[str, str]:
        """Says by split what differs from the data of a checkpoint; nothing when it is the same.

        facts, classes: of that data, as a checkpoint keeps them; None where one of before they were kept does not
        """
        before, now = facts or {}, self.facts()
        found = {}
        for split in ("train", "val"):
            there, here = before.get(split), now[split]
            if there and here and (words := _differing(there, here)):
                found[split] = words
            elif before and bool(there) != bool(here):
                found[split] = "none there" if here else "none now"
        if classes is not None and (words := first_class_difference(classes, self.classes)):
            found["classes"] = words
        return found


def first_class_difference(one: Sequence[str], other: Sequence[str], here: str = "there", there: str = "now") -> str:
    """Says where two lists of classes part; "" when they do not. here, there: the names of the lists."""
    if len(one) != len(other):
        return f"{len(one):,} {here}, {len(other):,} {there}"
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        if a != b:
            return f"number {number} is {a!r} {here} and {b!r} {there}"
    return ""


def changed_data_refusal(run: Path, differences: Mapping[str, str]) -> str:
    """Returns the message to somebody who goes on with a run on other data."""
    listing = "\n".join(f"  {what}: {words}" for what, words in differences.items())
    return (
        f"{run} was trained on other data than there are now:\n{listing}\n"
        "give the data of that run, another --run-dir, or --accept-changed-data to go on with these all the same"
    )


def _differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    if there.get("samples") != here["samples"]:
        return f"{there.get('samples')} samples there, {here['samples']} now"
    words = {
        "content": f"other shards ({there.get('shards')} there, {here['shards']} now)",
        "places": "other offsets or sizes of samples",
        "labels": "other labels",
        "classes": "other classes",
    }
    return "; ".join(text for key, text in words.items() if there.get(key) != here[key])


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
