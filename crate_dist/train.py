"""Trains the recipe of a run folder, from wherever its newest checkpoint stands.

    python -m crate_dist.train --arch crate_tiny --data /data/imagenet-shards

starts one process; under torchrun or srun the same line is one rank of many. launch/local.py and launch/slurm.py
start it for you.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from crate_dist import checkpoint
from crate_dist.checkpoint import CheckpointError, Progress
from crate_dist.cli import add_recipe_arguments, default_run_dir, recipe_from
from crate_dist.config import Recipe, RecipeError, derive_batch
from crate_dist.data.index import ShardError
from crate_dist.data.loader import Feed, Share, eval_loader, train_loader
from crate_dist.data.order import Order
from crate_dist.data.splits import open_splits
from crate_dist.distributed import World, detect_world, gather_objects, init_distributed, leave_distributed
from crate_dist.engine import Engine
from crate_dist.evaluate import evaluate
from crate_dist.metrics import Monitor, NotFinite, TooManyBadSamples, start_logging
from crate_dist.models.archs import build_model
from crate_dist.models.weights import export_model
from crate_dist.optim import Schedule, learning_rate
from crate_dist.run import RunFolder, read_recipe

logger = logging.getLogger(__name__)

EXPECTED_ERRORS = (RecipeError, ShardError, CheckpointError, NotFinite, TooManyBadSamples)
"""What a person can act on: shown as a message, without a traceback."""


@dataclass(frozen=True)
class TrainResult:
    """Where a run stands when train returns."""

    step: int
    finished: bool
    best_top1: float
    metrics: dict[str, float]


def train(run_dir: Path, recipe: Recipe | None = None) -> TrainResult:
    """Runs this process as one rank until the recipe is complete. Resumes by itself. A collective.

    recipe: opens the run folder with it, on rank 0; None: the folder has been opened, and knows its recipe

    Raises
    ------
    RecipeError, ShardError, CheckpointError: before the first step, for what cannot work
    NotFinite, TooManyBadSamples: in the middle, with the checkpoints before it intact
    """
    folder, world = RunFolder(Path(run_dir)), detect_world()
    device = init_distributed(world)
    try:
        if recipe is not None:
            _open_once(folder, recipe, world)
        start_logging(folder, world)
        return Trainer(folder, read_recipe(run_dir), world, device).run()
    finally:
        leave_distributed()


class Trainer:
    """One rank of one run."""

    def __init__(self, folder: RunFolder, recipe: Recipe, world: World, device: torch.device) -> None:
        self.folder, self.recipe, self.world, self.device = folder, recipe, world, device
        found = checkpoint.find_newest(folder.checkpoints, world, device)
        self.progress = found.progress if found else Progress()
        micro_batch, accumulation = derive_batch(recipe.train.global_batch, world.world_size, recipe.train.micro_batch)
        self.train_index, self.val_index = open_splits(recipe)
        self.schedule = Schedule(recipe.train.epochs, self.train_index.num_samples, recipe.train.global_batch)
        self.last_step = min(self.schedule.total_steps, recipe.train.max_steps or self.schedule.total_steps)
        self.share = Share(world.rank, world.world_size, recipe.train.global_batch, micro_batch)
        model = build_model(recipe.model, self.train_index.num_classes, recipe.train.seed)
        self.engine = Engine(model, recipe, device, micro_batch, accumulation)
        if found:
            self.engine.load(found)
            logger.info("resumed from %s", found.path)
        self.monitor = Monitor(folder, recipe, world, device, self.schedule, self.progress.step)

    def run(self) -> TrainResult:
        """The loop."""
        self.greet()
        self.catch_up_on_evaluation()
        feed = self.feed()
        while self.progress.step < self.last_step:
            self.take_step(feed)
            if self.reporting_is_due():
                self.monitor.report(self.progress.step)
            if self.evaluation_is_due():
                self.evaluate()
            if self.saving_is_due():
                self.save()
        del feed  # ends the loader's processes now and not at the exit of the interpreter, which would wait for them
        self.export()
        self.monitor.close()
        self.conclude()
        return TrainResult(self.progress.step, True, self.progress.best_top1, dict(self.progress.metrics))

    def greet(self) -> None:
        """Says what is about to happen."""
        model, share = self.engine.module, self.share
        logger.info(
            "%s, %.2f M parameters, %s on %d x %s; global batch %d = %d x %d accumulated x %d ranks; steps %d to %d",
            self.recipe.model.arch,
            sum(p.numel() for p in model.parameters()) / 1e6,
            self.recipe.train.precision,
            self.world.world_size,
            self.device.type,
            share.global_batch,
            share.micro_batch,
            share.accumulation,
            share.world_size,
            self.progress.step,
            self.last_step,
        )

    def conclude(self) -> None:
        """Says what has come of it."""
        best = self.progress
        accuracy = f"; best top-1 {best.best_top1:.2f} % at step {best.best_step}" if best.best_step >= 0 else ""
        logger.info("complete at step %d%s; weights in %s", best.step, accuracy, self.folder.model("last"))

    def feed(self) -> Feed:
        """This rank's micro-batches from the current step on."""
        train, data = self.recipe.train, self.recipe.data
        order = Order(self.train_index.shard_sizes, train.seed, self.recipe.lanes, data.window)
        size = self.recipe.model.image_size
        return Feed(train_loader(self.train_index, order, self.share, data, size, self.progress.step), self.device)

    def take_step(self, feed: Feed) -> None:
        """One optimizer step, timed."""
        lr = learning_rate(self.progress.step, self.recipe.optim, self.schedule)
        began, waited = time.perf_counter(), feed.wait_s
        result = self.engine.step(feed, lr, self.progress.step)
        self.monitor.add(
            result.loss,
            result.grad_norm,
            lr,
            images=self.share.micro_batch * self.share.accumulation,
            wait_s=feed.wait_s - waited,
            step_s=time.perf_counter() - began,
        )
        self.monitor.add_bad(result.bad)
        self.progress = replace(self.progress, step=self.progress.step + 1)

    def reporting_is_due(self) -> bool:
        """Every so many steps, and before every save, so that a resumed curve has the same points."""
        return self.progress.step % self.recipe.log.every_steps == 0 or self.saving_is_due()

    def evaluation_is_due(self) -> bool:
        """At the first step after every so many whole epochs, and at the end; once per step."""
        step, every = self.progress.step, self.recipe.log.eval_every_epochs
        if self.val_index is None or step in (0, self.progress.evaluated_at):
            return False
        epochs = self.schedule.epochs_completed(step)
        ended_just_now = epochs > self.schedule.epochs_completed(step - 1)
        return (ended_just_now and epochs % every == 0) or step == self.last_step

    def saving_is_due(self) -> bool:
        """Every so many steps, after every evaluation, and at the end."""
        step = self.progress.step
        periodic = step % self.recipe.checkpoint.every_steps == 0
        return periodic or step == self.last_step or step == self.progress.evaluated_at or self.evaluation_is_due()

    def catch_up_on_evaluation(self) -> None:
        """A run may have been ended between a save and the evaluation of the same step."""
        if self.evaluation_is_due():
            self.evaluate()
            self.save()

    def evaluate(self) -> None:
        """Exact accuracy over the whole validation split."""
        assert self.val_index is not None
        loader = eval_loader(
            self.val_index,
            self.world.rank,
            self.world.world_size,
            self.recipe.data,
            self.recipe.model.image_size,
            self.recipe.train.micro_batch,
        )
        result = evaluate(self.engine.predict, loader, self.device)
        self.monitor.evaluation(self.progress.step, result.scalars())
        best = result.top1 > self.progress.best_top1
        self.progress = replace(
            self.progress,
            evaluated_at=self.progress.step,
            best_top1=max(result.top1, self.progress.best_top1),
            best_step=self.progress.step if best else self.progress.best_step,
            metrics=result.scalars(),
        )

    def save(self) -> None:
        """Publishes a checkpoint of this step, then removes what need not be kept."""
        self.monitor.flush()
        saved = checkpoint.publish(
            self.folder.checkpoints,
            self.engine.state(),
            self.engine.layouts,
            self.progress,
            self.world,
            self.device,
            recipe=self.recipe.mathematics(),
        )
        logger.info("saved %s", saved.path)
        if self.world.is_main:
            checkpoint.prune(self.folder.checkpoints, self.recipe.checkpoint.keep, self.progress.best_step)

    def export(self) -> None:
        """Writes the weights alone of the last and of the best checkpoint."""
        if self.world.is_main:
            for saved in checkpoint.list_checkpoints(self.folder.checkpoints):
                for which, step in (("last", self.progress.step), ("best", self.progress.best_step)):
                    if saved.step == step:
                        export_model(
                            self.folder.model(which), self.engine.module.config, saved.weights(), self.about(saved)
                        )
        dist.barrier()

    def about(self, saved: checkpoint.Checkpoint) -> dict[str, object]:
        """What an exported model says of itself."""
        return {
            "recipe": self.recipe.name,
            "step": saved.step,
            "epochs": saved.step / self.schedule.steps_per_epoch,
            "metrics": dict(saved.progress.metrics),
            "classes": list(self.train_index.classes),
            "mean": list(self.recipe.data.mean),
            "std": list(self.recipe.data.std),
            "precision": self.recipe.train.precision,
            "eval_crop": self.recipe.data.eval_crop,
        }


def _open_once(folder: RunFolder, recipe: Recipe, world: World) -> None:
    """Rank 0 opens the run folder, the others learn how that went: together they would trip over each other."""
    problem = ""
    if world.is_main:
        try:
            folder.open(recipe)
        except RecipeError as error:
            problem = str(error)
    problem = gather_objects(problem)[0]
    if problem:
        raise RecipeError(problem)


def main(argv: list[str] | None = None) -> int:
    """Command line: resolves a recipe, opens the run folder, trains."""
    parser = argparse.ArgumentParser(prog="python -m crate_dist.train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_recipe_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        recipe = recipe_from(arguments)
        train(arguments.run_dir or default_run_dir(recipe), recipe)
    except EXPECTED_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
