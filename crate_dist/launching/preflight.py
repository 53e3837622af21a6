"""Checks, before a launcher starts anything, whether the run can work at all. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from crate_dist.checkpoint.format import MANIFEST, newest_manifest, other_head
from crate_dist.checkpoint.mirror.joining import Found as MirrorFound
from crate_dist.checkpoint.mirror.joining import look as look_into_mirror
from crate_dist.checkpoint.mirror.record import DamagedRecord
from crate_dist.config import Recipe, RecipeError, derive_batch
from crate_dist.config.rules import as_set, differing, for_new_head
from crate_dist.data.identity import DataIdentity, changed_data_refusal
from crate_dist.data.index import ShardError
from crate_dist.data.splits import Splits, open_splits
from crate_dist.errors import UserError
from crate_dist.locations import redacted
from crate_dist.run.checkpoints import checkpoint_names
from crate_dist.run.folder import RunFolder, read_recipe
from crate_dist.terminal import labelled


@dataclass(frozen=True)
class Preflight:
    """A run that was looked at and found in order."""

    folder: RunFolder
    resumes: bool
    data_root: Path | str
    train_images: int
    val_images: int
    classes: int
    world_size: int
    micro_batch: int
    accumulation: int
    init_from: Path | None
    accepted_data: str | bool
    """Digest of data that the run is to go on with though they are not its checkpoint's; False: of none."""
    mirror: MirrorFound | None = None
    trackers: tuple[str, ...] = ()
    origin: str = ""
    """What the run that it begins from has otherwise in its model."""

    def __str__(self) -> str:
        batch = self.micro_batch * self.accumulation * self.world_size
        begins = [] if self.resumes else [("begins from", f"{self.init_from or 'random weights'}{self.origin}")]
        lines = [
            ("run folder", f"{self.folder.path} ({'goes on' if self.resumes else 'new'})"),
            *([("mirror", str(self.mirror))] if self.mirror else []),
            *([("wandb", "gets what the run measures, and its recipe")] if "wandb" in self.trackers else []),
            *begins,
            (
                "data",
                f"{redacted(self.data_root)}: {self.train_images:,} images to train on and {self.val_images:,} to "
                f"validate on, {self.classes:,} classes",
            ),
            (
                "global batch",
                f"{batch} = {self.micro_batch} images at a time x {self.accumulation} accumulated "
                f"x {self.world_size} ranks",
            ),
        ]
        return "\n".join(labelled(name, text) for name, text in lines)


def preflight(
    recipe: Recipe,
    world_size: int,
    run_dir: Path,
    start_over: bool = False,
    accept_changed_data: bool = False,
    open_data: Callable[[Recipe], Splits] = open_splits,
) -> Preflight:
    """Checks data, batch and run folder for a run on `world_size` ranks, and writes nothing.

    start_over: what the folder holds will be set aside; accept_changed_data: other data than before are no problem
    open_data: opens the splits; of many runs at once, those of the same data only once

    Raises RecipeError: with everything that is wrong, one paragraph each.
    """
    problems: list[str] = []
    accepted_data: str | bool = False
    folder = RunFolder(run_dir)
    micro_batch = accumulation = 0
    train = val = mirror = None
    try:
        mirror = look_into_mirror(folder, recipe, start_over)
    except DamagedRecord as error:
        problems.append(f"{error}; --set checkpoint.mirror= starts without one")
    except ShardError as error:
        problems.append(f"the mirror does not answer: {error}; --set checkpoint.mirror= starts without one")
    except (UserError, OSError) as error:
        problems.append(str(error))
    restored = mirror.manifest if mirror else None
    try:
        given = recipe.train
        micro_batch, accumulation = derive_batch(given.global_batch, world_size, given.micro_batch, given.group)
    except RecipeError as error:
        goes_on = restored or (not start_over and os.access(run_dir, os.X_OK) and folder.has_begun())
        problems.append(str(error).partition("; these ranks take")[0] if goes_on else str(error))
    try:
        train, val = open_data(recipe)
    except UserError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"cannot read the data, {error.filename}: {error.strerror}; --data names others")
    try:
        if train and not start_over and (manifest := restored or newest_manifest(folder.checkpoints)):
            data = DataIdentity.of(train, val)
            if refusal := other_head(run_dir, manifest, train.num_classes):
                problems.append(refusal)
            elif changed := data.differences(manifest.data, manifest.classes):
                accepted_data = accept_changed_data and data.digest
                if not accepted_data and not folder.record.data_was_accepted(manifest.progress.step, data.digest):
                    problems.append(changed_data_refusal(run_dir, changed))
    except UserError as error:
        problems.append(str(error))
    except (NotADirectoryError, PermissionError):
        pass  # said below
    except OSError as error:
        problems.append(f"cannot see whether {run_dir} holds a run: {error}")
    try:
        if not start_over:
            folder.check(recipe)
        _check_writable(run_dir)
    except RecipeError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"cannot look into the run folder {run_dir}: {error.strerror}; --run-dir names another")
    origin = ""
    try:
        if recipe.train.init_from and (
            start_over or not (folder.has_begun() or restored)
        ):  # else it goes on from its own
            origin = check_init_from(recipe.train.init_from, recipe)
    except RecipeError as error:
        problems.append(str(error))
    if "wandb" in recipe.log.trackers and find_spec("wandb") is None:
        problems.append(
            f"log.trackers asks for wandb, which is not installed here: pip install -e '.[wandb]' in the clone, or "
            f"--set log.trackers={','.join(name for name in recipe.log.trackers if name != 'wandb') or '[]'}"
        )
    if problems:
        raise RecipeError("\n\n".join(problems))
    assert train is not None
    return Preflight(
        folder=folder,
        resumes=not start_over and (folder.has_begun() or restored is not None),
        data_root=recipe.data.find_root(),
        train_images=train.num_samples,
        val_images=val.num_samples if val else 0,
        classes=train.num_classes,
        world_size=world_size,
        micro_batch=micro_batch,
        accumulation=accumulation,
        init_from=recipe.train.init_from,
        accepted_data=accepted_data,
        mirror=mirror,
        trackers=recipe.log.trackers,
        origin=origin,
    )


def check_init_from(source: Path, recipe: Recipe) -> str:
    """Looks at --init-from as far as that goes without reading the weights; says which parts are others, "" for none.

    Parts of other names may have the same weights, which is seen when the run starts.
    Raises RecipeError: there is nothing, nothing that could be weights, or the run of a model of another size.
    """
    given = f"--init-from {source}"
    if not source.exists():
        raise RecipeError(
            f"{given}: there is nothing; it takes a run folder, a checkpoint in one, or a file of weights"
        )
    if not os.access(source, os.R_OK):
        raise RecipeError(f"{given}: no permission to read it")
    if source.is_file():
        return ""
    run = RunFolder(source)
    if run.recipe_file.is_file():
        if not checkpoint_names(run.checkpoints):
            raise RecipeError(f"{given}: this run has no checkpoint yet; wait for its first, or begin from another")
    elif (source / MANIFEST).is_file():
        run = RunFolder.of_checkpoint(source)
    else:
        raise RecipeError(
            f"{given}: this folder is neither a run, with a recipe.toml, nor a checkpoint, nor a file of weights"
        )
    begun_from = read_recipe(run.path)
    if recipe.train.init_weights == "ema" and not begun_from.optim.ema_decay:
        raise RecipeError(f"{given}: this run has no average of its weights, for which train.init_weights=ema asks")
    there, here = begun_from.model, recipe.model
    other = differing(there.parts(), here.parts())
    if other and there.arch != here.arch:
        raise RecipeError(
            f"{given}: its weights are those of a {there.arch}, and the recipe's model is a {here.arch}; "
            f"--set model.arch={there.arch} would fit"
        )
    size = {key: value for key, value in other.items() if key in ("model.width", "model.depth", "model.heads")}
    if size:
        raise RecipeError(
            f"{given}: its weights are those of a {there.described()}, and the recipe's model is a {here.described()}; "
            f"{as_set(size)} would fit"
        )
    other |= {
        f"model.options.{name}": value for name, value in there.options.items() if here.options.get(name) != value
    }
    if recipe.train.init_head == "new":
        other = for_new_head(other)
    return f", whose model has other parts: {as_set(other)}" if other else ""


def folder_of_weights(source: Path) -> Path:
    """Returns the folder that has to be seen for --init-from to be read: of a checkpoint, its whole run."""
    return RunFolder.of_checkpoint(source).path if (source / MANIFEST).is_file() else source.parent


def _check_writable(run_dir: Path) -> None:
    there = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not there.is_dir():
        raise RecipeError(f"the run folder {run_dir} cannot be made: {there} is a file; --run-dir takes a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RecipeError(f"no permission to write the run folder {run_dir} in {there}; --run-dir names another")
