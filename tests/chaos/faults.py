"""Named points of the program, and what may go wrong there. Nothing of it is in the program: calls are wrapped."""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from crate_dist.checkpoint.format import manifest_digest
from crate_dist.run.checkpoints import PREFIX, UNFINISHED

Action = Literal["stand still", "slow", "disk full", "clock"]


@dataclass(frozen=True)
class Point:
    """A call: module, name in it, and which calls are meant, by their arguments."""

    module: str
    name: str
    concerns: Callable[..., bool] = lambda *_, **__: True


def _file(descriptor: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{descriptor}"))


def _is_rank_file(name: object) -> bool:
    return str(name).startswith("rank-") and str(name).endswith(".pt")


POINTS = {
    # the first initialisation
    "joining the other ranks": Point("crate_dist.train", "init_distributed"),
    "locking the run folder": Point("os", "link", lambda _, new: Path(new).parent.name == "lock"),
    "making the run folder": Point("pathlib", "Path.mkdir", lambda path, *_, **__: path.name == "checkpoints"),
    "writing the recipe": Point("crate_dist.run.folder", "write_whole", lambda path, _: path.name == "recipe.toml"),
    "noting the start": Point("crate_dist.run.record", "write_whole", lambda path, _: path.name == "run.json"),
    "building the engine": Point("crate_dist.training.trainer", "Engine"),
    # a step
    "loading a checkpoint": Point("crate_dist.training.engine", "Engine.load"),
    "taking a step": Point("crate_dist.training.engine", "Engine.step"),
    "reading a batch": Point("crate_dist.data.loader", "TrainBatches.__getitem__"),
    "writing a line of metrics": Point("crate_dist.training.metrics", "Monitor._write"),
    # a save
    "copying the state": Point("crate_dist.checkpoint.saving", "Saver._copy"),
    "making the folder of a save": Point(
        "pathlib", "Path.mkdir", lambda path, *_, **__: path.name.startswith(UNFINISHED)
    ),
    "writing a rank's file": Point("crate_dist.checkpoint.saving", "_Digesting.write"),
    "syncing a rank's file": Point("os", "fsync", lambda number: _is_rank_file(_file(number).name)),
    "writing the manifest": Point("crate_dist.checkpoint.format", "write_whole"),
    "syncing the manifest": Point("os", "fsync", lambda number: ".manifest.json" in _file(number).name),
    "syncing the folder of a save": Point("os", "fsync", lambda number: _file(number).name.startswith(UNFINISHED)),
    "renaming the folder of a save": Point("pathlib", "Path.replace", lambda _, new: Path(new).name.startswith(PREFIX)),
    "syncing the renamed folder": Point("os", "fsync", lambda number: _file(number).name == "checkpoints"),
    # pruning
    "setting a checkpoint aside": Point(
        "pathlib",
        "Path.replace",
        lambda old, new: old.name.startswith(PREFIX) and Path(new).name.startswith(UNFINISHED),
    ),
    "removing a checkpoint's files": Point("os", "unlink", lambda path, **_: _is_rank_file(path)),
    "removing a checkpoint's folder": Point("os", "rmdir", lambda path, **_: Path(path).name.startswith(UNFINISHED)),
    # an evaluation
    "evaluating": Point("crate_dist.training.engine", "Engine.predict"),
    "measuring the white box": Point("crate_dist.training.live", "profile"),
    "noting an evaluation": Point("crate_dist.training.metrics", "Monitor.evaluation"),
    "beginning to save": Point("crate_dist.checkpoint.saving", "Saver.save"),
    # the end
    "exporting the weights": Point("crate_dist.checkpoint.export", "export_model"),
    "syncing the weights": Point("os", "fsync", lambda number: "model-" in _file(number).name),
    "noting the end": Point("crate_dist.training.metrics", "Monitor.close"),
}


@dataclass(frozen=True)
class Fault:
    """A fault at the `nth` call of a point.

    "stand still": the process is stopped before the call, for the test to kill or to leave
    "slow": this call takes `seconds` longer, and `times - 1` after it
    "disk full": this call fails, and `times - 1` after it; "clock": the time jumps by `seconds` and goes on from there
    """

    point: str
    nth: int = 1
    action: Action = "stand still"
    times: int = 1
    seconds: float = 0.0

    def mark(self, notes: Path) -> Path:
        """The file that says the fault has struck, and in which process."""
        return notes / f"{self.point.replace(' ', '-')}-{self.nth}"

    def install(self, notes: Path) -> None:
        """Wraps the call, in this process."""
        point = POINTS[self.point]
        module, *names, last = importlib.import_module(point.module), *point.name.split(".")
        owner: Any = module
        for name in names:
            owner = getattr(owner, name)
        original = getattr(owner, last)
        calls = 0

        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            if point.concerns(*arguments, **keywords):
                calls += 1
                if self.nth <= calls < self.nth + self.times:
                    self._strike(notes)
            return original(*arguments, **keywords)

        setattr(owner, last, wrapped)

    def _strike(self, notes: Path) -> None:
        mark = self.mark(notes)
        beside = mark.with_suffix(".new")
        beside.write_text(str(os.getpid()))
        os.rename(beside, mark)
        if self.action == "stand still":
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this thread, before its next instruction
        elif self.action == "slow":
            time.sleep(self.seconds)
        elif self.action == "disk full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        else:
            clock, seconds = time.time, self.seconds
            time.time = lambda: clock() + seconds


def note_samples(path: Path) -> None:
    """Has this process write down of which samples each of its steps is made: digests of their pixels and labels."""
    from crate_dist.training.engine import Engine, MicroBatch, StepResult

    take_step = Engine.step

    def noting(engine: Engine, batches: Iterator[MicroBatch], lr: float, step: int) -> StepResult:
        used: list[str] = []

        def noted() -> Iterator[MicroBatch]:
            for images, labels in batches:
                rows = zip(images.numpy(), labels.tolist(), strict=True)
                used.extend(hashlib.sha256(pixels.tobytes() + bytes([label])).hexdigest() for pixels, label in rows)
                yield images, labels

        result = take_step(engine, noted(), lr, step)
        with path.open("a") as file:
            file.write(json.dumps([step, used]) + "\n")
        return result

    Engine.step = noting  # type: ignore[assignment,method-assign]


def flip_a_bit(path: Path) -> None:
    """In the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    """To half of its length."""
    os.truncate(path, path.stat().st_size // 2)


def forget_a_rank(manifest: Path) -> None:
    """Writes a wrong world size into a manifest, with a digest to it."""
    said = {**json.loads(manifest.read_text()), "world_size": 1}
    manifest.write_text(json.dumps({**said, "digest": manifest_digest(said)}))


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
