"""Exports the weights alone of a complete run's last and best checkpoint, each with a model card."""

from __future__ import annotations

import logging
from typing import Any

from crate_dist.checkpoint.format import AVERAGE, WEIGHTS, Progress
from crate_dist.checkpoint.loading import Checkpoint, list_checkpoints
from crate_dist.config import Recipe
from crate_dist.data.identity import Identity
from crate_dist.data.index import ShardIndex
from crate_dist.locations import name_above
from crate_dist.models.config import ModelConfig
from crate_dist.models.weights.card import card_path, write_card
from crate_dist.models.weights.write import export_model
from crate_dist.run.folder import MODELS, RunFolder
from crate_dist.run.lock import Tenure
from crate_dist.run.record import code_version

logger = logging.getLogger(__name__)


def export(
    folder: RunFolder,
    recipe: Recipe,
    config: ModelConfig,
    progress: Progress,
    steps_per_epoch: float,
    train: ShardIndex,
    val: ShardIndex | None,
    tenure: Tenure,
) -> None:
    """Writes model-last.pt and model-best.pt, and averages of the weights where there are some.

    One whose checkpoint is damaged is not written. An average of older weights is removed, with its card, where
    the newer ones have none. The log says so.
    """
    there = {saved.step: saved for saved in list_checkpoints(folder.checkpoints)}
    steps = {"last": progress.step, "best": progress.best_step}
    for which in MODELS:
        name, _, average = which.partition("-")
        step = steps[name]
        saved, path = there.get(step), folder.model(which)
        if step < 0:
            continue
        if average and not (saved and AVERAGE in saved.manifest.kinds):
            if saved and path.exists() and not saved.damaged():
                tenure.check()
                card_path(path).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                logger.info("%s was an average of older weights, and is removed: step %d has none", path, step)
            continue
        problem = saved.damaged() if saved else f"step {step} could not be saved"
        if saved is None or problem:
            logger.error("%s is not written: %s", path, problem)
            continue
        about: dict[str, Any] = {"data": facts_of(train, val)}
        about |= {"classes": list(train.classes), "class_names": list(train.class_names)}
        about |= _about(saved, recipe, steps_per_epoch, bool(average))
        about["changed_data"] = [note for note in folder.record.changed_data() if note["step"] <= saved.step]
        tenure.check()
        export_model(path, config, saved.weights(AVERAGE if average else WEIGHTS), about)
        tenure.check()
        write_card(path, config, about)


def facts_of(train: ShardIndex, val: ShardIndex | None) -> dict[str, dict[str, Any]]:
    """Returns what `meta` says of the splits: their folder's name, not where it lies, and what their indexes say."""
    return {
        name: {
            "name": name_above(index.place),
            "samples": index.num_samples,
            "classes": index.num_classes,
            "origin": index.made_by.get("layout"),
            "fingerprint": Identity.of(index).digest,
        }
        for name, index in (("train", train), ("val", val))
        if index is not None
    }


def _about(saved: Checkpoint, recipe: Recipe, steps_per_epoch: float, average: bool) -> dict[str, Any]:
    metrics = {name: value for name, value in saved.progress.metrics.items() if ("/ema_" in name) == average}
    return {
        **({"ema_decay": recipe.optim.ema_decay} if average else {}),
        "recipe": recipe.name,
        "step": saved.step,
        "epochs": saved.step / steps_per_epoch,
        "metrics": {name.replace("/ema_", "/"): value for name, value in metrics.items()},
        "evaluated_at": saved.progress.evaluated_at,
        "recipe_values": recipe.deciding_values(),
        "code": code_version(),
        "precision": recipe.train.precision,
        **recipe.images.model_dump(mode="json"),
    }
