"""Gives what a run measures to Weights & Biases: the run's own names and steps, one curve over all its starts.

A step that a restart makes again is not sent twice. What was sent, each name's last step, is read from the server and
from the files that wandb leaves under RUN/wandb: it writes late, so that after a kill neither metrics.jsonl nor the
checkpoint tells. What is missing there, metrics.jsonl gives.
"""

from __future__ import annotations

import html
import json
import logging
import os
import struct
import tomllib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from crate_dist.config import Recipe
from crate_dist.data.decode import Pixels
from crate_dist.run.folder import RunFolder
from crate_dist.run.lock import ALONE
from crate_dist.run.record import new_run_id

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)

_PROJECT = "crate-dist"
_INIT_S, _FINISH_S = 30.0, 60.0
_LAST_STEPS = "sent"  # of the run's summary: name -> last step
_EVERY_START = "run/"  # of these, a later start has more to say about the same step
_SYNCED = ".wandb.synced"  # wandb's own mark beside a file that the server has all of
_BLOCK, _HEAD = 32768, struct.Struct("<IHB")
_WHOLE, _FIRST, _LAST = 1, 2, 4


class WandbRun:
    """The run as wandb has it. Whatever goes wrong there is said, and training goes on.

    Project, entity and mode are wandb's own: WANDB_PROJECT (else crate-dist), WANDB_ENTITY, WANDB_MODE. Where its
    server does not answer, or nobody is logged in, it writes to RUN/wandb, and says what sends that.

    lines: of metrics.jsonl, as far as they are not to be made again
    check: called before the run folder is changed; raises LostTheRun
    """

    def __init__(
        self,
        folder: RunFolder,
        recipe: Recipe,
        lines: Iterable[Mapping[str, Any]] = (),
        check: Callable[[], None] = ALONE.check,
    ) -> None:
        self._folder = folder
        self._run: wandb.Run | None = None
        check()
        run_id = folder.record.run_id()
        if not run_id:
            folder.record.note_run_id(run_id := new_run_id())
        with self._surviving():
            self._known = on_disk(folder.wandb, run_id)
            self._run = _started(folder, recipe, run_id)
            if self._run.resumed:
                self._known = dict(sorted([*self._known.items(), *arrived(dict(self._run.summary)).items()]))
            self._run.summary[_LAST_STEPS] = self._known
            self._last_steps = self._run.summary[_LAST_STEPS]
            self._run.define_metric("step", summary="max")
            self._run.define_metric("*", step_metric="step")
            logger.info("wandb: %s", self._whereabouts())
            for line in lines:
                self._catch_up(dict(line))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Sends one point of each of these curves."""
        self._log({name: value for name, value in values.items() if self._lacks(name, step)}, step)

    def layers(self, name: str, values: Sequence[float], step: int) -> None:
        """Sends one value of every layer, the first layer first."""
        self.scalars({f"{name}/layer-{layer:02d}": value for layer, value in enumerate(values, start=1)}, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Sends a text, as it is written."""
        if self._lacks(name, step):
            import wandb

            self._log({name: wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)}, step)

    def picture(self, name: str, pixels: Pixels, step: int) -> None:
        """Sends a picture, uint8 (height, width, 3)."""
        if self._lacks(name, step):
            import wandb

            self._log({name: wandb.Image(pixels)}, step)

    def sync(self) -> None:
        """Leaves to wandb when it writes: what it loses, the next start sends again."""

    def close(self) -> None:
        """Sends what is left, for a minute at most, and ends it."""
        with self._surviving():
            if self._run:
                import wandb

                offline, where, files = self._run.offline, self._whereabouts(), Path(self._run.dir).parent
                self._run.finish()
                if offline:
                    wandb.teardown()  # waits until its process has written the file
                else:
                    (files / f"run-{self._folder.record.run_id()}{_SYNCED}").touch()
                logger.info("wandb: %s", where)
        self._run = None

    def _lacks(self, name: str, step: int) -> bool:
        return self._run is not None and (step > self._known.get(name, -1) or name.startswith(_EVERY_START))

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        with self._surviving():
            if self._run and values:  # step as a value of its own: wandb's only grows, and a save ends steps later
                self._run.log({**values, "step": step})
                self._last_steps.update(dict.fromkeys(values, step))

    def _catch_up(self, line: dict[str, Any]) -> None:
        step = line.pop("step")
        for name, value in line.items():
            if isinstance(value, list):
                self.layers(name, value, step)
        self.scalars({name: value for name, value in line.items() if "/" in name and not isinstance(value, list)}, step)

    def _whereabouts(self) -> str:
        assert self._run
        if self._run.offline:
            return f"offline; where there is a network, `wandb sync {self._folder.wandb}` sends it"
        return str(self._run.url)

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            logger.warning("wandb: %s; this start goes on without it, and the next one sends what is missing", error)
            self._run = None


def arrived(summary: Mapping[str, Any]) -> dict[str, int]:
    """Reads from a run's summary on the server the last step of every name."""
    before_last = dict(summary.get("step") or {}).get("max", -1) - 1  # better one value twice than none
    return dict.fromkeys(summary, before_last) | dict(summary.get(_LAST_STEPS) or {})


def on_disk(files: Path, run_id: str) -> dict[str, int]:
    """Reads the last step of every name from the files of starts that were offline, or got everything to the server."""
    known: dict[str, int] = {}
    for path in sorted(files.glob(f"*run-*-{run_id}*/run-{run_id}.wandb")):
        if path.parent.name.startswith("offline-") or path.with_suffix(_SYNCED).exists():
            try:
                for name, step in sent(path):
                    known[name] = max(step, known.get(name, -1))
            except OSError as error:
                logger.warning("wandb: %s; what is in this file may be sent twice", error)
    return known


def sent(path: Path) -> Iterator[tuple[str, int]]:
    """Reads from a file of wandb's the name and the step of every value in it.

    What a crash has cut off or damaged is removed, with all that follows, and a file with nothing whole gets another
    name: `wandb sync` would stop there, and pass over the starts that followed. Raises OSError.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    whole, data = 0, path.read_bytes()
    with suppress(Exception):  # of a record that cannot be read, as of one whose checksum is wrong: that is the end
        for record, end in _records(data):
            history = Record.FromString(record).history
            values = {item.key or item.nested_key[0]: item.value_json for item in history.item}
            step = int(json.loads(values.get("step", "-1")))
            whole = end
            yield from ((name, step) for name in values if step >= 0 and name != "step" and not name.startswith("_"))
    if not whole:
        path.rename(path.with_suffix(".damaged"))
    elif whole < len(data):
        os.truncate(path, whole)


def _records(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Yields the whole records of a log in LevelDB's format behind wandb's 7 bytes, each with where it ends."""
    position, record = _HEAD.size, b""
    while position + _HEAD.size <= len(data):
        if _BLOCK - position % _BLOCK < _HEAD.size:  # no head is divided between blocks
            position += _BLOCK - position % _BLOCK
            continue
        checksum, length, kind = _HEAD.unpack_from(data, position)
        position += _HEAD.size + length
        part = data[position - length : position]
        if position > len(data) or checksum != zlib.crc32(part, zlib.crc32(bytes([kind]))):
            return
        record = part if kind in (_WHOLE, _FIRST) else record + part
        if kind in (_WHOLE, _LAST):
            yield record, position


def _started(folder: RunFolder, recipe: Recipe, run_id: str) -> wandb.Run:
    """Begins or goes on with the run, offline where its server is out of reach. Raises wandb.Error."""
    import wandb

    def init(mode: Literal["offline"] | None = None) -> wandb.Run:
        return wandb.init(
            id=run_id,
            name=folder.path.resolve().name,
            project=os.environ.get("WANDB_PROJECT") or _PROJECT,
            dir=folder.path,
            config=tomllib.loads(recipe.to_toml()),  # which leaves out what is nobody else's business
            mode=mode,
            resume="allow",
            settings=wandb.Settings(
                console="off",
                silent=True,
                save_code=False,
                disable_git=True,
                x_disable_meta=True,  # it has the arguments of the program, which may name a secret
                init_timeout=_INIT_S,
                login_timeout=_INIT_S,
                finish_timeout=_FINISH_S,
                finish_timeout_raises=True,
            ),
        )

    try:
        return init()
    except (wandb.errors.CommError, wandb.errors.UsageError) as error:
        logger.warning("wandb: %s", " ".join(str(error).split())[:200])
        wandb.teardown()  # of the attempt, which holds the id
        return init("offline")
