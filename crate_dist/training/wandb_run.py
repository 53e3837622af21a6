"""Gives what a run measures to Weights & Biases: the run's own names and steps, one curve over all its starts.

A step that a restart makes again is not sent twice. What was sent is read from the server, and from the files that
wandb leaves under RUN/wandb: it writes late, so that after a kill neither metrics.jsonl nor the checkpoint tells. What
is missing there, metrics.jsonl gives.
"""

from __future__ import annotations

import html
import json
import logging
import os
import struct
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
_EVERY_START = "run/"  # of these, a later start has more to say about the same step
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
        self._folder, self._known = folder, dict[str, int]()
        self._run: wandb.Run | None = None
        check()
        run_id = folder.record.run_id()
        if not run_id:
            folder.record.note_run_id(run_id := new_run_id())
        with self._surviving():
            for path in sorted(folder.wandb.glob(f"*run-*-{run_id}*/run-{run_id}.wandb")):
                for name, step in sent(path):
                    self._known[name] = max(step, self._known.get(name, -1))
            self._run = _started(folder, recipe, run_id)
            if self._run.resumed:
                last = dict(self._run.summary.get("step") or {}).get("max", -1)
                self._known |= {name: max(last, self._known.get(name, -1)) for name in dict(self._run.summary)}
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

                offline, where = self._run.offline, self._whereabouts()
                self._run.finish()
                if offline:
                    wandb.teardown()  # waits until its process has written the file
                logger.info("wandb: %s", where)
        self._run = None

    def _lacks(self, name: str, step: int) -> bool:
        return self._run is not None and (step > self._known.get(name, -1) or name.startswith(_EVERY_START))

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        with self._surviving():
            if self._run and values:  # step as a value of its own: wandb's only grows, and a save ends steps later
                self._run.log({**values, "step": step})

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


def sent(path: Path) -> Iterator[tuple[str, int]]:
    """Reads from a file of wandb's the name and the step of every value in it.

    What a crash has cut off is removed, and a file of nothing but its head: `wandb sync` would stop there, and pass
    over the starts that followed.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    whole = 0
    for record, end in _records(path.read_bytes()):
        whole = end
        values = {item.key or item.nested_key[0]: item.value_json for item in Record.FromString(record).history.item}
        for name in values:
            if "step" in values and name != "step" and not name.startswith("_"):
                yield name, int(json.loads(values["step"]))
    size = path.stat().st_size
    if size <= _HEAD.size:
        path.unlink()
    elif 0 < whole < size:
        os.truncate(path, whole)


def _records(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Yields the whole records of a log in LevelDB's format behind wandb's 7 bytes, each with where it ends."""
    position, record = _HEAD.size, b""
    while position + _HEAD.size <= len(data):
        if _BLOCK - position % _BLOCK < _HEAD.size:  # no head is divided between blocks
            position += _BLOCK - position % _BLOCK
            continue
        _, length, kind = _HEAD.unpack_from(data, position)
        position += _HEAD.size + length
        if position > len(data) or not kind:
            return
        record = (b"" if kind in (_WHOLE, _FIRST) else record) + data[position - length : position]
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
            ),
        )

    try:
        return init()
    except (wandb.errors.CommError, wandb.errors.UsageError) as error:
        logger.warning("wandb: %s", " ".join(str(error).split())[:200])
        wandb.teardown()  # of the attempt, which holds the id
        return init("offline")
