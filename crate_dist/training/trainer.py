"""Runs the training loop, and what is due after a step: reports, measures, evaluations, saves."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch
import torch.distributed as dist
from torch.profiler import record_function

from crate_dist.checkpoint import loading as checkpoint
from crate_dist.checkpoint.export import export
from crate_dist.checkpoint.finetune import begin_from
from crate_dist.checkpoint.format import Progress
from crate_dist.checkpoint.resuming import progress_on
from crate_dist.checkpoint.saving import Saver, prune
from crate_dist.config import Recipe, derive_batch
from crate_dist.data.decode import Pixels
from crate_dist.data.feed import Feed
from crate_dist.data.identity import DataIdentity
from crate_dist.data.index import ShardError
from crate_dist.data.loader import Share, TrainLoader, eval_loader, eval_transform, train_transform
from crate_dist.data.order import training_order
from crate_dist.data.reader import BadSample
from crate_dist.data.splits import open_splits
from crate_dist.data.workers import workers_of_rank
from crate_dist.distributed import Left, gather_objects
from crate_dist.evaluation.accuracy import evaluate
from crate_dist.evaluation.mistakes import Mistakes
from crate_dist.models.build import build_model
from crate_dist.run.folder import RunFolder
from crate_dist.run.lock import Tenure
from crate_dist.training import compiling
from crate_dist.training.averaging import warn_of_short_run
from crate_dist.training.compiled_cache import CompiledCache
from crate_dist.training.engine import Engine, MicroBatch, NotFinite
from crate_dist.training.finite import post_mortem
from crate_dist.training.interrupt import Interrupt
from crate_dist.training.live import Live
from crate_dist.training.metrics import Monitor
from crate_dist.training.mirroring import Mirroring
from crate_dist.training.mixing import MixedBatch, Mixing
from crate_dist.training.optim import Schedule, learning_rate, listing, parameter_groups
from crate_dist.training.out_of_memory import out_of_memory
from crate_dist.training.profiler import StepTrace
from crate_dist.training.samples import SHOWN, mistakes_picture, training_picture
from crate_dist.training.startup import Startup
from crate_dist.training.utilisation import Utilisation
from crate_dist.training.watchdog import COMPILING, Watchdog
from crate_dist.world import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """The state of a run when `train` returns."""

    step: int
    finished: bool
    best_top1: float
    metrics: dict[str, float]


class Trainer:
    """One rank of one run."""

    def __init__(
        self,
        folder: RunFolder,
        recipe: Recipe,
        world: World,
        device: torch.device,
        interrupt: Interrupt,
        watchdog: Watchdog,
        startup: Startup,
        tenure: Tenure,
        accept_changed_data: bool | str = False,
    ) -> None:
        self.folder, self.recipe, self.world, self.device = folder, recipe, world, device
        self.interrupt, self.watchdog, self.startup, self.tenure = interrupt, watchdog, startup, tenure
        interrupt.end_at_once()  # until something is made that is not in the checkpoint: a step, or an evaluation
        self.damaged: list[str] = []
        self.mirroring = Mirroring(folder, recipe, world, interrupt, watchdog, tenure)
        found = checkpoint.find_newest(folder.checkpoints, world, self.damaged)
        micro_batch, accumulation = derive_batch(
            recipe.train.global_batch, world.world_size, recipe.train.micro_batch, recipe.train.group
        )
        self.train_index, self.val_index = open_splits(recipe)
        self.data = DataIdentity.of(self.train_index, self.val_index)
        if len(set(gather_objects(self.data.digest))) > 1:
            raise ShardError("the ranks read different indexes: the shards were replaced just now; start again")
        self.progress = progress_on(self.data, found, folder, world, accept_changed_data) if found else Progress(step=0)
        views = recipe.order.repeats * self.train_index.num_samples
        self.schedule = Schedule(recipe.train.epochs, views, recipe.train.global_batch)
        self.last_step = recipe.train.last_step(views)
        if self.progress.step > self.last_step:  # fewer samples or train.max_steps than before: the run is over
            logger.warning("step %d is behind the last one, %d: nothing to train", self.progress.step, self.last_step)
            self.last_step = self.progress.step
        self.workers = workers_of_rank(recipe.data.workers, world.cores)
        self.mixing = Mixing(recipe)
        self.share = Share(world.rank, world.world_size, recipe.train.global_batch, micro_batch)
        startup.mark("checkpoint and index")
        watchdog.beat("building the engine", COMPILING)
        model = build_model(recipe.model, self.train_index.num_classes, recipe.train.seed)
        if recipe.train.init_from and not found:
            how = recipe.train.init_head, recipe.train.init_heads, recipe.train.init_weights
            origin = begin_from(recipe.train.init_from, model, self.train_index.classes, *how)
            if world.is_main:
                tenure.check()
                folder.record.note_origin(asdict(origin))
        compiled = CompiledCache(folder.compiled, world, device)
        if compiling.should_compile(recipe.train.compile, device):
            compiled.load()
        self.engine = Engine(model, recipe, device, micro_batch, accumulation)
        compiled.save(tenure)
        if found:
            self.engine.partitions.load(found)
            logger.info("resumed from %s", found.path)
        startup.mark("engine")
        keep, max_failures = recipe.checkpoint.keep, recipe.checkpoint.max_failures
        known = self.damaged, self.mirroring.published
        self.saver = Saver(folder.checkpoints, self.engine.layouts, world, keep, max_failures, tenure, *known)
        self.saved_at = self.progress.step
        steps = self.progress.step, self.last_step
        utilisation = Utilisation(self.engine.module.config, recipe, micro_batch, device)
        self.monitor = Monitor(folder, recipe, world, device, self.schedule, *steps, tenure, utilisation)
        self.trace = StepTrace(folder, recipe, world, device, self.progress.step, watchdog, tenure)
        self.live = Live(recipe, world, device, self.val_index or self.train_index, self.schedule)

    def run(self) -> TrainResult:
        """Runs the loop. After an error a save that is under way may end, while the folder is still ours."""
        try:
            return self.loop()
        except BaseException:
            self.saver.leave()
            self.mirroring.leave()
            raise

    def loop(self) -> TrainResult:
        """Takes steps, and does what is due after each."""
        self.greet()
        self.heed_request()
        if not self.catch_up():
            return self.stop_early()
        feed, told_to_stop = Feed(self.loader(self.workers), self.device), False
        while self.progress.step < self.last_step and not told_to_stop:
            with self.trace.step(self.progress.step + 1):
                self.take_step(feed)
            if self.reporting_is_due() or self.live.is_due(self.progress.step):
                self.check()
            if self.reporting_is_due():
                self.monitor.report(self.progress.step, self.engine.own_s())
                self.heed_request()
            # What is left here is made by the next start, from the checkpoint of this step.
            if not self.measure() or not self.evaluate():
                told_to_stop = True
                break
            if self.saving_is_due():
                self.save()
            told_to_stop = self.interrupt.agreed() and self.progress.step < self.last_step
        self.trace.end()
        del feed  # ends its workers: their cores and memory are free for what is left to do
        return self.stop_early() if told_to_stop else self.complete()

    def greet(self) -> None:
        """Says what is about to happen."""
        model, share = self.engine.module, self.share
        logger.info(
            "%s, %.2f M parameters, %s on %d x %s; global batch %d = %d x %d accumulated x %d ranks; steps %d to %d",
            self.recipe.model.described(),
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
        if self.world.is_main:
            lines = listing(parameter_groups(model, self.recipe.optim))
            logger.info("\n  ".join([f"{self.recipe.optim.name} of", *lines]))
            warn_of_short_run(self.recipe.optim.ema_decay, self.last_step)
        if (repeats := self.recipe.order.repeats) > 1:
            logger.info(
                "an epoch has %d views of each of %s training images, %s steps; images per second count views",
                *(repeats, f"{self.train_index.num_samples:,}", f"{self.schedule.steps_per_epoch:,.0f}"),
            )
        if self.workers > self.world.cores and self.world.is_main:
            logger.warning(
                "data.workers=%d on %d core(s) of each rank: they hold each other up, and the training too; without "
                "data.workers there are %d",
                *(self.workers, self.world.cores, workers_of_rank(None, self.world.cores)),
            )

    def heed_request(self) -> None:
        """Takes a request to stop, which rank 0 finds in the run folder, for a signal."""
        # Not Path.exists, which raises what a file system says that is ill for a moment.
        if self.world.is_main and os.path.exists(self.folder.stop_request):
            self.interrupt.tell()

    def complete(self) -> TrainResult:
        """Exports the weights and says what has come of it."""
        self.finish_saving()
        if self.world.is_main:
            prune(self.folder.checkpoints, self.recipe.checkpoint.keep, self.progress, self.tenure, self.damaged)
            config, indexes = self.engine.module.config, (self.train_index, self.val_index)
            export(
                self.folder, self.recipe, config, self.progress, self.schedule.steps_per_epoch, *indexes, self.tenure
            )
        dist.barrier()
        self.monitor.close()
        self.mirroring.finish(exported=True)
        logger.info("complete at step %d", self.progress.step)
        return self.result(finished=True)

    def stop_early(self) -> TrainResult:
        """Saves what there is, after a signal; the same command goes on from there."""
        logger.info("told to stop: saving step %d", self.progress.step)
        if self.saved_at != self.progress.step:
            self.check()
            self.monitor.report(self.progress.step, self.engine.own_s())
            self.save()
        self.finish_saving()
        self.monitor.close()
        self.mirroring.finish()
        logger.info("stopped at step %d of %d; the same command goes on from there", self.progress.step, self.last_step)
        return self.result(finished=False)

    def result(self, finished: bool) -> TrainResult:
        """Returns the state of the run."""
        return TrainResult(self.progress.step, finished, self.progress.best_top1, dict(self.progress.metrics))

    def loader(self, workers: int) -> TrainLoader:
        """Returns this rank's micro-batches from the current step on, made by `workers` processes; 0: by this one."""
        recipe, step = self.recipe, self.progress.step
        order = training_order(self.train_index.shard_sizes, recipe)
        transform = train_transform(recipe.augment, recipe.images, recipe.model.image_size)
        return TrainLoader(self.train_index, order, self.share, transform, workers, step)

    def take_step(self, feed: Feed) -> None:
        """Takes one optimizer step, timed."""
        lr = learning_rate(self.progress.step, self.recipe.optim, self.schedule)
        first = not self.startup.over
        self.watchdog.beat(f"taking step {self.progress.step + 1}", COMPILING if first else 1.0)
        began, waited, bad = time.perf_counter(), feed.wait_s, list[BadSample]()
        shown = dict[str, Pixels]()

        def micro_batches() -> Iterator[MicroBatch | MixedBatch]:
            while True:
                with record_function("data"):
                    batch = next(feed)
                images, labels = given = self.mixing.mixed(batch, self.progress.step)
                if self.progress.step == 0 and self.world.is_main and not shown:
                    shown.update(training_picture(images, labels, self.train_index))
                bad.extend(batch.bad)
                yield given

        try:
            result = self.engine.step(micro_batches(), lr, self.progress.step)
        except NotFinite as error:
            raise self.post_mortem(error) from None
        except torch.OutOfMemoryError as error:
            raise out_of_memory(self.recipe, self.share.micro_batch, self.world.world_size, self.device) from error
        self.monitor.add(
            result.loss,
            result.hits,
            result.grad_norm,
            lr,
            images=self.share.micro_batch * self.share.accumulation,
            wait_s=feed.wait_s - waited,
            step_s=time.perf_counter() - began,
        )
        if first:
            self.startup.mark("step", ("batch", feed.wait_s))
            self.startup.report()
        self.interrupt.hold()
        self.monitor.bad.add_replaced(bad)
        self.progress = replace(self.progress, step=self.progress.step + 1)
        self.monitor.pictures(self.progress.step, shown)

    def check(self) -> None:
        """Waits for the last step, before anything is made of its outcome: none that was not finite goes further."""
        began = time.perf_counter()
        try:
            self.engine.check()
        except NotFinite as error:
            raise self.post_mortem(error) from None
        self.monitor.waited_for_device(time.perf_counter() - began)

    def post_mortem(self, error: NotFinite) -> NotFinite:
        """Goes back to the step that was not taken, whose weights the engine still has, and says what was wrong."""
        self.progress = replace(self.progress, step=error.step)
        return post_mortem(self.engine, self.loader(workers=0), error.step, self.watchdog)

    def reporting_is_due(self) -> bool:
        """Says whether to report: every log.every_steps, and before a save, so that a resumed curve is the same."""
        return self.progress.step % self.recipe.log.every_steps == 0 or self.saving_is_due()

    def evaluation_is_due(self) -> bool:
        """Says whether to evaluate: at the first step after every log.eval_every_epochs, and at the end; once."""
        step, every = self.progress.step, self.recipe.log.eval_every_epochs
        if self.val_index is None or step in (0, self.progress.evaluated_at):
            return False
        epochs = self.schedule.epochs_completed(step)
        ended_just_now = epochs > self.schedule.epochs_completed(step - 1)
        return (ended_just_now and epochs % every == 0) or step == self.last_step

    def saving_is_due(self) -> bool:
        """Says whether to save: every checkpoint.every_steps, after every evaluation, and at the end."""
        step = self.progress.step
        periodic = step % self.recipe.checkpoint.every_steps == 0
        return periodic or step == self.last_step or step == self.progress.evaluated_at or self.evaluation_is_due()

    def catch_up(self) -> bool:
        """Does what was due at the step of the checkpoint, after its save. Returns False when that is left."""
        if not self.measure(unless_known=True):
            return False
        if self.evaluation_is_due():
            if not self.evaluate():
                return False
            self.save()
        return True

    def measure(self, unless_known: bool = False) -> bool:
        """Measures the white box when it is due. Returns False, on all ranks, when that is left for a signal."""
        step = self.progress.step
        if step == 0 or not self.live.is_due(step):
            return True
        return self.live.measure(self.engine.module, step, self.monitor, self.interrupt, unless_known)

    def evaluate(self) -> bool:
        """Counts the accuracy over the whole validation split when it is due. Returns False as `measure` does."""
        if not self.evaluation_is_due():
            return True
        assert self.val_index is not None
        batches = eval_loader(
            self.val_index,
            self.world.rank,
            self.world.world_size,
            eval_transform(self.recipe.images, self.recipe.model.image_size),
            self.share.micro_batch,  # which is what was compiled
            self.workers,
        )
        began, mistakes = time.perf_counter(), Mistakes(SHOWN)

        def predict(images: torch.Tensor) -> torch.Tensor:
            self.watchdog.beat("evaluating")
            return self.engine.predict(images)

        averaged = None
        try:
            tallies = [mistakes] if self.world.is_main else []
            result = evaluate(predict, batches, self.device, tallies, leave=lambda: self.interrupt.heard)
            if self.engine.partitions.average:
                with self.engine.partitions.averaged():
                    averaged = evaluate(predict, batches, self.device, leave=lambda: self.interrupt.heard)
        except Left:
            logger.info("the evaluation of step %d is left, and made by the next start", self.progress.step)
            return False
        self.interrupt.hold()
        self.monitor.bad.add_unreadable(result.bad, result.problem(self.recipe.data.max_bad_fraction))
        pictures = mistakes_picture(mistakes.found(), self.val_index)
        values = result.scalars() | (averaged.scalars("ema_") if averaged else {})
        seconds = time.perf_counter() - began
        self.monitor.evaluation(self.progress.step, values, seconds, result.unreadable, pictures)
        judged = averaged or result
        best = judged.better_than(self.progress.best_top1)
        self.progress = replace(
            self.progress,
            evaluated_at=self.progress.step,
            best_top1=judged.top1 if best else self.progress.best_top1,
            best_step=self.progress.step if best else self.progress.best_step,
            metrics=values,
        )
        return True

    def save(self) -> None:
        """Begins to save this step; its writing goes on beside the training."""
        self.watchdog.beat(f"saving step {self.progress.step}")
        self.monitor.flush()
        state, buffers, about = self.engine.state(), self.engine.partitions.buffers(), self.recipe.deciding_values()
        data = {"classes": list(self.data.classes), "data": self.data.facts()}
        names = list(self.train_index.class_names)
        self.monitor.saved(self.saver.save(state, self.progress, buffers, recipe=about, class_names=names, **data))
        self.saved_at = self.progress.step

    def finish_saving(self) -> None:
        """Waits for the last save. One that has failed is tried again, until it succeeds or too many have failed."""
        self.monitor.saved(self.saver.wait())
        while self.saver.failures:
            self.save()
            self.monitor.saved(self.saver.wait())
