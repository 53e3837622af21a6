"""The record of a run's mirror: what is there whole, and who writes there. The only place that knows its format.

    MIRROR/NAME/mirror.json                              the record; NAME is that of the run folder
    MIRROR/NAME/ID/step-00000500.1f0c/manifest.json      one file of a checkpoint, as in the run folder
    MIRROR/NAME/ID/step-00000500.1f0c/metrics.jsonl      a file of the run, as it was when that was copied
    MIRROR/NAME/mirror-ID.json                           the record of a run that --start-over has set aside
    MIRROR/NAME/mirror-damaged-TIME.json                 the same of one that could not be read

A file gets a name that no other writer gives, and is never written again: its folder has a piece of the writer's token
in its name. A checkpoint is there when the record names it, and the record is written last. So nothing is ever listed,
and places that cannot list, as plain web servers, will do; and of two writers neither spoils what the other has put.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from crate_dist.checkpoint.format import MANIFEST
from crate_dist.data.index import ShardError
from crate_dist.data.remote.fetch import Damaged, NotThere, RetryPolicy
from crate_dist.data.remote.store import LOOKING, Store
from crate_dist.errors import UserError
from crate_dist.run.checkpoints import step_name
from crate_dist.run.folder import RunFolder

RECORD = "mirror.json"
VERSION = 1
_REMEDY = "bring back the one that was there, or --start-over sets it aside"
_MOST_BYTES = 64 * 2**20
_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.=+-]*"
_OBJECT = re.compile(rf"step-\d{{8,}}(\.\d+)?\.[0-9a-f]{{4,32}}/{_WORD}")
_LOCAL = re.compile(
    r"checkpoints/step-\d{8,}(\.\d+)?/(manifest\.json|rank-\d{5}\.pt|buffers\.pt)|(metrics|ledger|bad_samples)\.jsonl|run\.json|"
    r"recipe\.toml|model-(last|best)(-ema)?\.(pt|md)|(tensorboard/)?events\.out\.tfevents\.[^/\0]{1,200}"
)
"""The files of a run folder that a record may name: nothing leads out of it, and none of them is run."""


class MirrorError(UserError):
    """A mirror that cannot be used, or not by this run; the message says what would do."""


class DamagedRecord(ShardError):
    """A record that cannot be read: damaged, or not what the mirror holds, as a page that a server shows meanwhile."""


def _matching(pattern: re.Pattern[str]) -> AfterValidator:
    def check(text: str) -> str:
        if not pattern.fullmatch(text):
            raise ValueError(f"{text!r} is no name that a mirror has")
        return text

    return AfterValidator(check)


_Object = Annotated[str, _matching(_OBJECT)]
_Local = Annotated[str, _matching(_LOCAL)]
_Id = Annotated[str, Field(pattern=r"^[0-9a-f]{8,32}$")]
_Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]


@dataclass(frozen=True)
class Copied:
    """A file in the mirror: its name there, its bytes, their SHA-256."""

    object: _Object
    bytes: _Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Mirrored:
    """A checkpoint that is whole in the mirror, by its name in the run folder, and the run's files beside it.

    best_step: of the best checkpoint that the run had by then, -1 for none; files: by their place in the run folder
    """

    name: Annotated[str, Field(pattern=r"^step-\d{8,}(\.\d+)?$")]
    step: _Count
    best_step: Annotated[int, Field(strict=True, ge=-1)]
    files: Mapping[_Local, Copied]

    def __post_init__(self) -> None:
        """Raises ValueError for a step that is not its name's, and where there is no manifest."""
        if self.name.partition(".")[0] != step_name(self.step):
            raise ValueError(f"{self.name} is not of step {self.step}")
        if MANIFEST not in self.checkpoint_files:
            raise ValueError(f"{self.name} has no {MANIFEST}")

    @property
    def checkpoint_files(self) -> dict[str, Copied]:
        """The files of the checkpoint alone, by name."""
        begin = f"checkpoints/{self.name}/"
        return {place.removeprefix(begin): file for place, file in self.files.items() if place.startswith(begin)}

    @property
    def run_files(self) -> dict[str, Copied]:
        """The files of the run beside it, by their place in the run folder."""
        return {place: file for place, file in self.files.items() if not place.startswith("checkpoints/")}


@dataclass(frozen=True)
class Writer:
    """A start that copies to the mirror.

    number: larger than that of every start before; time: of its last sign, in its own clock
    beat_s: seconds between its signs, at most; ended: it has left
    """

    number: _Count
    token: str
    host: str
    folder: str
    time: str
    beat_s: Annotated[float, Field(gt=0, le=3600)] = 60.0
    ended: bool = False

    @classmethod
    def of_this_process(cls, folder: Path, beat_s: float) -> Writer:
        """Returns this process as a writer, which is yet to get its number."""
        return cls(0, uuid.uuid4().hex, platform.node(), str(folder.absolute()), _now(), beat_s)

    def __str__(self) -> str:
        return f"{self.folder} on {self.host}, last heard of at {self.time}"


@dataclass(frozen=True)
class MirrorRecord:
    """What is in the mirror of a run.

    id: the run's; checkpoints: those that are whole, the oldest first
    unfinished: files that may be there and belong to none of them: being copied, or yet to be removed
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    id: _Id
    writer: Writer
    checkpoints: Sequence[Mirrored] = field(default_factory=tuple)
    unfinished: Sequence[_Object] = field(default_factory=tuple)
    version: int = VERSION

    @property
    def newest(self) -> Mirrored | None:
        """The newest checkpoint that is whole."""
        return self.checkpoints[-1] if self.checkpoints else None

    @property
    def step(self) -> int:
        """Its step; -1 where there is none."""
        return self.newest.step if self.newest else -1

    def sign(self, **changes: Any) -> MirrorRecord:
        """Returns the same with a sign of life of its writer, and with changes of his."""
        return replace(self, writer=replace(self.writer, time=_now(), **changes))

    def up_to(self, step: int) -> MirrorRecord:
        """Returns the same without the checkpoints after a step, the files of which are to be removed."""
        kept = replace(self, checkpoints=tuple(saved for saved in self.checkpoints if saved.step <= step))
        return replace(kept, unfinished=(*self.unfinished, *sorted(self.objects() - kept.objects())))

    def objects(self) -> set[str]:
        """The names of all files that belong to a checkpoint."""
        return {file.object for saved in self.checkpoints for file in saved.files.values()}


_PLAIN = TypeAdapter(MirrorRecord)


class RunMirror:
    """The mirror of one run: its record, and the store of its files.

    place: of all runs' mirrors; folder: the run folder, by whose name the run is known there, as it was given

    Raises MirrorError where that would be in the run folder, or around it.
    """

    def __init__(self, place: Path | str, folder: RunFolder, policy: RetryPolicy) -> None:
        given = os.path.basename(os.path.abspath(folder.path))  # a link's own name: what it leads to may be a job's
        name = re.sub(r"[^A-Za-z0-9_.=+-]", "_", given).lstrip(".=+-") or "run"
        if isinstance(place, Path):
            there, run = (place / name).resolve(), folder.path.resolve()
            if there == run or there in run.parents or run in there.parents:
                raise MirrorError(
                    f"checkpoint.mirror={place} would copy the run to {there}, and the run folder is {run}: the two "
                    "would mix. Give a folder of another mount"
                )
        self.store = Store(place, policy).below(name)

    def __str__(self) -> str:
        return str(self.store)

    def read(self, policy: RetryPolicy | None = None) -> MirrorRecord | None:
        """Reads the record; None: the place was reached, and there is none.

        Raises ShardError: it cannot be reached; DamagedRecord: it was, and the record is not one of this program's.
        MirrorError: it is one of a later version's.
        """
        try:
            said = self.store.get(RECORD, _json, policy)
        except NotThere:
            return None
        except ShardError as error:
            if isinstance(error.__cause__, Damaged):
                raise DamagedRecord(f"{self} has no record that can be read: {error.__cause__}; {_REMEDY}") from None
            raise
        try:
            if said["version"] != VERSION:
                raise MirrorError(
                    f"{self} was written by a later version of crate-dist; give another checkpoint.mirror"
                )
            return _PLAIN.validate_python(said)
        except ValidationError as error:
            wrong = error.errors(include_url=False)[0]
            problem = f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}"
        except (KeyError, TypeError) as error:
            problem = f"{type(error).__name__}: {error}"
        raise DamagedRecord(f"{self}/{RECORD} is no record of a mirror: {problem}; {_REMEDY}")

    def write(self, record: MirrorRecord) -> None:
        """Writes the record. Raises ShardError."""
        self.store.put(RECORD, json.dumps(asdict(record), indent=1).encode(), policy=LOOKING)

    def keep_aside(self, record: MirrorRecord) -> None:
        """Keeps the record of a run that was started over; its files stay as well. Raises ShardError."""
        self.store.put(f"mirror-{record.id}.json", json.dumps(asdict(record), indent=1).encode())

    def keep_damaged_aside(self) -> str:
        """Keeps a record that cannot be read, byte for byte; returns its new name. Raises ShardError."""
        name = f"mirror-damaged-{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}.json"
        self.store.put(name, self.store.get(RECORD, b"".join))
        return name

    def files(self, run_id: str, object_name: str) -> tuple[Store, str]:
        """Returns the store of a file of a run, and its name in that."""
        folder, _, name = object_name.partition("/")
        return self.store.below(run_id).below(folder), name


def _json(chunks: Iterable[bytes]) -> Any:
    """Reads JSON. Raises Damaged for what is none: a server may show a file that is being written."""
    text = bytearray()
    for chunk in chunks:
        text += chunk
        if len(text) > _MOST_BYTES:
            raise Damaged(f"{RECORD} is longer than any record")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{RECORD} is no JSON: {error}") from None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
