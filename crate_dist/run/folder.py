"""The run folder: one run, one folder, one curve. Imports no torch.

recipe.toml          the resolved recipe
run.json             the code's version, each start of the run, the weights that it began from if not new ones, and
                     changes of its data that were accepted; see run/record.py
checkpoints/         step-00000500/ …, published whole or not at all
published.json       the newest step that was ever among them
events.out.tf…       TensorBoard's files, one for each start; an older run's are in tensorboard/, where it goes on
profile/             traces of log.profile_steps, one per rank; see training/profiler.py
wandb/               what Weights & Biases has of the run, or is to get; see training/wandb_run.py
metrics.jsonl        one line per logged step
bad_samples.jsonl    samples that could not be read, by split and name
ledger.jsonl         the time, by what it was spent on: a line per start, report, evaluation and save
mirror.json          which start copies checkpoints to a mirror, and up to which step they are there
compiled/            what torch.compile made, a file for each GPU of a node; see training/compiled_cache.py
lock/                the job that works here now; see run/lock.py
stop-requested.json  who asked the run to stop, and when; there until a person starts it again
failed-start-…/      files of starts that never made a step, left by a start with another recipe
logs/                rank-00000.log …, one per rank
slurm/               submitit's files
code/                the code that its starts ran; see run/snapshot.py
model-last.pt        the weights alone, and model-last.md, their card; model-best.pt and .md beside them, and, where
                     the recipe has the weights averaged, model-last-ema.pt and model-best-ema.pt
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Callable
from pathlib import Path

from crate_dist.config import RECIPE_FILE, Recipe, RecipeError, load_recipe
from crate_dist.config.rules import unread
from crate_dist.files import write_whole
from crate_dist.run.checkpoints import checkpoint_names, published_file
from crate_dist.run.lock import ALONE
from crate_dist.run.record import Record

MODELS = ("best", "last", "best-ema", "last-ema")
"""The weights that a complete run exports: of two checkpoints, and the averages in them, where there are any."""

STOP_REQUEST = "stop-requested.json"
"""The file by which a person asks a run to save and end; while it is there, no launcher starts the ranks again."""

EVENTS = "events.out.tfevents."
"""How the names of TensorBoard's files begin, by which it finds them."""

_MAY_BEGIN_OR_END = "optim.ema_decay"
"""What trains beside the run, and has no say in it: it may be switched on and off, but be no other one."""
_BEFORE_A_RUN = ("slurm", "logs", "lock", "run.lock")


class RunFolder:
    """A run folder: the names of what stands in it, as drawn above, and how it is opened and set aside."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file = path / RECIPE_FILE
        self.record_file = path / "run.json"
        self.record = Record(self.record_file)
        self.checkpoints = path / "checkpoints"
        self.published = published_file(self.checkpoints)
        self.profile = path / "profile"
        self.wandb = path / "wandb"
        self.metrics = path / "metrics.jsonl"
        self.bad_samples = path / "bad_samples.jsonl"
        self.ledger = path / "ledger.jsonl"
        self.compiled = path / "compiled"
        self.mirror = path / "mirror.json"
        self.lock = path / "lock"
        self.stop_request = path / STOP_REQUEST
        self.logs = path / "logs"
        self.slurm = path / "slurm"
        self.code = path / "code"

    @classmethod
    def of_checkpoint(cls, checkpoint: Path) -> RunFolder:
        """Returns the folder of the run that saved a checkpoint."""
        return cls(checkpoint.resolve().parents[1])

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's files: the run's own, by whose name TensorBoard calls it, or of an older run
        tensorboard/, since its curves go on where they began."""
        older = self.path / "tensorboard"
        return older if older.is_dir() else self.path

    def event_files(self) -> list[Path]:
        """Lists TensorBoard's files, in the order in which they were begun."""
        return sorted(self.tensorboard.glob(f"{EVENTS}*"))

    def model(self, which: str) -> Path:
        """Returns the file of the exported weights, `which` being one of MODELS."""
        return self.path / f"model-{which}.pt"

    def log_file(self, rank: int) -> Path:
        """Returns the file of one rank's log."""
        return self.logs / f"rank-{rank:05d}.log"

    def jobs(self) -> list[str]:
        """Lists the SLURM jobs that were submitted to work here (12, or 12_3 for a task of an array), newest last.

        Raises OSError when the folder cannot be listed.
        """
        try:
            names = [name for name in os.listdir(self.slurm) if re.fullmatch(r"\d+(_\d+)?", name)]
        except FileNotFoundError:
            return []
        return sorted(names, key=lambda name: [int(part) for part in name.split("_")])

    def check(self, recipe: Recipe, queued: str = "") -> None:
        """Raises RecipeError unless the folder is new, empty, or of a run with the same deciding values.

        queued: the job that is to train what stands there, though it may not have begun
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise RecipeError(f"{self.path} is a file; --run-dir takes a folder")
        if not self.recipe_file.is_file():
            foreign = sorted(p.name for p in self.path.iterdir() if p.name not in _BEFORE_A_RUN and p.name[0] != ".")
            if foreign:
                if runs := runs_in(self.path):
                    raise RecipeError(
                        f"{self.path} is no run, but holds some ({runs}); give --run-dir one of them, or a new "
                        "or empty folder"
                    )
                raise RecipeError(
                    f"{self.path} holds something that is no run ({', '.join(foreign[:3])}); "
                    "give --run-dir a new or empty folder"
                )
            return
        changed = self._changed(recipe)
        if changed and (queued or self.has_begun()):
            listing = "\n".join(f"  {line}" for line in changed)
            raise RecipeError(
                f"{self.path} holds a run of another recipe:\n{listing}\n"
                f"to continue that run, give the same values, or --config {self.recipe_file}, which has them; "
                "to start a new one, another --run-dir, or --start-over, which sets that one aside"
                + (f"; job {queued} works on it: `scancel {queued}` first" if queued else "")
            )

    def has_begun(self) -> bool:
        """Tells whether the run has made steps that somebody may want.

        Raises RecipeError when that cannot be seen.
        """
        try:
            return bool(_size(self.metrics) or _size(self.published) or checkpoint_names(self.checkpoints))
        except OSError as error:
            raise RecipeError(f"cannot see whether {self.path} holds a run: {error}") from error

    def set_aside(self, check: Callable[[], None] = ALONE.check) -> Path | None:
        """Moves all that the run has left to PATH.before-TIME, where nothing is lost. The caller holds the lock.

        Returns that place; None: there was nothing.

        check: called before each move; raises LostTheRun when the lock is another's
        Raises RecipeError when it is no run, or when something cannot be moved.
        """
        there = {path.name for path in self.path.iterdir() if path.name[0] != "."} - {self.lock.name}
        if not there:
            return None
        if not self.recipe_file.is_file() and not there <= set(_BEFORE_A_RUN):
            raise RecipeError(f"{self.path} is no run folder: --start-over sets only runs aside")
        place = self.path.resolve()
        beside = f"{place.name}.before-{_stamp()}"
        aside = (place if place.is_mount() else place.parent) / beside  # a rename leads from no file system to another
        try:
            aside.mkdir()
            for name in sorted(there, key=lambda name: (name == self.recipe_file.name, name)):  # a run until the end
                check()
                (place / name).rename(aside / name)
        except OSError as error:
            raise RecipeError(f"cannot move {self.path} to {aside}: {error.strerror}") from error
        return aside

    def make(self) -> None:
        """Creates the folder. Raises RecipeError when that cannot be."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"cannot make the run folder {self.path}: {error.strerror}") from error

    def open(self, recipe: Recipe, check: Callable[[], None] = ALONE.check) -> None:
        """Creates the folder, or checks an existing one; then writes the recipe and the record.

        The caller holds the lock. Files of starts with another recipe that never made a step are put aside.

        check: called before whatever changes something; raises LostTheRun when the lock is another's
        Raises RecipeError as `check` does, or when the folder cannot be written.
        """
        self.check(recipe)
        self.make()
        try:
            if self.recipe_file.is_file() and self._changed(recipe):
                self._put_failed_starts_aside(check)
            check()
            write_whole(self.recipe_file, recipe.to_toml())  # first: by it a folder is known to be a run's
            for folder in (self.checkpoints, self.logs):
                folder.mkdir(exist_ok=True)
            self.record.begin()
        except OSError as error:
            raise RecipeError(f"cannot write the run folder {self.path}: {error.strerror}") from error

    def _changed(self, recipe: Recipe) -> list[str]:
        return differing_values(load_recipe(self.recipe_file), recipe)

    def _put_failed_starts_aside(self, check: Callable[[], None]) -> None:
        aside = self.path / f"failed-start-{_stamp()}"
        aside.mkdir()
        curves = self.event_files() if self.tensorboard == self.path else [self.tensorboard]
        for path in (self.record_file, *curves, self.wandb, self.metrics, self.ledger, self.recipe_file):
            if path.exists():
                check()
                path.rename(aside / path.name)


def differing_values(there: Recipe, here: Recipe) -> list[str]:
    """Returns a line for each value that decides the result and is another one in the other recipe.

    What no part of either model reads decides nothing, though it was once possible to give it.
    """
    before, now = there.deciding_values(), here.deciding_values()
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    nothing = {f"model.{name}" for name in unread(there.model.parts()) & unread(here.model.parts())}
    keys = [key for key in keys if key not in nothing]
    if not (before[_MAY_BEGIN_OR_END] and now[_MAY_BEGIN_OR_END]):
        keys = [key for key in keys if key != _MAY_BEGIN_OR_END]
    return [f"{key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in keys]


def read_recipe(run_dir: Path) -> Recipe:
    """Reads the recipe of a run folder. Raises RecipeError when there is none."""
    folder = RunFolder(Path(run_dir))
    if not folder.recipe_file.is_file():
        runs = runs_in(folder.path)
        what = f"the runs in it are {runs}: give one of them" if runs else "--arch or --config begins a run there"
        raise RecipeError(f"{run_dir} is no run folder: there is no {folder.recipe_file.name} in it; {what}")
    return load_recipe(folder.recipe_file)


def runs_in(path: Path, most: int = 5) -> str:
    """Names the runs that lie in a folder, "" where there are none."""
    names = sorted(recipe.parent.name for recipe in path.glob("*/recipe.toml"))
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _size(path: Path) -> int:
    """Returns bytes; 0 when there is no such file. Raises OSError when that cannot be seen, as Path.exists does not."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def _stamp() -> str:
    return datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
