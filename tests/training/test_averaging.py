"""The moving average of the weights is what its formula says, on any number of ranks, and touches nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from crate_dist.checkpoint import saving
from crate_dist.checkpoint.export import export
from crate_dist.checkpoint.format import CheckpointError, Progress
from crate_dist.checkpoint.loading import list_checkpoints
from crate_dist.config import Recipe, build_recipe
from crate_dist.data.index import ShardIndex
from crate_dist.doctor.fake_cluster import fake_cluster
from crate_dist.models.batch_norm import statistics
from crate_dist.models.build import build_model
from crate_dist.run.folder import RunFolder
from crate_dist.run.lock import Tenure
from crate_dist.training.averaging import warn_of_short_run
from crate_dist.training.engine import Engine
from crate_dist.world import World
from tests.ranks import spawn
from tests.training.test_engine import GLOBAL_BATCH, batch_of, make_engine, recipe, take_steps

DECAY = 0.75
SAVED_AFTER, STEPS = 2, 4


def with_average() -> Recipe:
    return recipe(name="adamw", decay="matrices", ema_decay=DECAY)


def of_weights(engine: Any, kind: str = "fp32") -> torch.Tensor:
    """A kind of state of both groups, of all ranks, with its padding cut off, in one vector."""
    whole = []
    for part, layout in zip(engine.state()[kind], engine.layouts, strict=True):
        every = [part]
        if (ranks := torch.distributed.get_world_size()) > 1:
            every = [torch.empty_like(part) for _ in range(ranks)]
            torch.distributed.all_gather(every, part)
        whole.append(torch.cat(every)[: layout.numel])
    return torch.cat(whole)


def averaged_run(world: World, device: torch.device, folder: Path) -> dict[str, Any]:
    """Four steps, saved after two; what of them can be told on every rank."""
    engine = make_engine(world, device, with_average())
    seen = [of_weights(engine)]
    for step in range(STEPS):
        take_steps(engine, world, step, step + 1)
        seen.append(of_weights(engine))
        if step + 1 == SAVED_AFTER:
            saving.publish(folder, engine.state(), engine.layouts, Progress(step=SAVED_AFTER), world)
    module = {name: p.clone() for name, p in engine.module.named_parameters()}
    images = batch_of(9, world)[0]
    raw, average = engine.predict(images), of_weights(engine, "ema")
    with engine.partitions.averaged():
        shown = torch.cat([engine.module.get_parameter(n).flatten() for group in engine.layouts for n in group.names])
        averaged = engine.predict(images)
    return {
        "again": resumed(world, device, folder),
        "seen": seen,
        "average": average,
        "shown": torch.equal(shown.detach(), average.to(shown.dtype)),
        "others": not torch.equal(averaged, raw),
        "restored": all(torch.equal(p, module[name]) for name, p in engine.module.named_parameters())
        and torch.equal(engine.predict(images), raw)
        and torch.equal(of_weights(engine), seen[-1]),
    }


def resumed(world: World, device: torch.device, folder: Path) -> list[torch.Tensor]:
    """The average as it was loaded, and after the rest of the steps."""
    engine = make_engine(world, device, with_average())
    engine.partitions.load(list_checkpoints(folder)[-1])
    before = of_weights(engine, "ema")
    take_steps(engine, world, SAVED_AFTER, STEPS)
    return [before, of_weights(engine, "ema")]


@pytest.mark.spawn
def test_two_ranks_average_as_written_out_save_show_and_restore_and_any_number_goes_on(tmp_path: Path) -> None:
    for rank in (first := spawn(averaged_run, 2, tmp_path)):
        expected = rank["seen"][0].double()
        for weights in rank["seen"][1:]:
            expected = DECAY * expected + (1 - DECAY) * weights.double()
        torch.testing.assert_close(rank["average"].double(), expected, rtol=1e-6, atol=1e-7)
        assert rank["shown"]
        assert rank["others"]
        assert rank["restored"]
    saved = list_checkpoints(tmp_path)[-1]
    assert (saved.manifest.kinds, saved.manifest.buffers) == (["ema", "exp_avg", "exp_avg_sq", "fp32"], {})
    again = first[0]["again"][1]
    assert torch.equal(again, first[0]["average"]), "bit for bit on as many ranks"
    with fake_cluster(1):
        loaded, alone = resumed(ALONE, torch.device("cpu"), tmp_path)
    by_name = saved.weights("ema")
    assert torch.equal(
        loaded, torch.cat([by_name[n].flatten() for group in saved.manifest.groups for n in group.names])
    )
    torch.testing.assert_close(alone, again, rtol=1e-3, atol=1e-3)  # gradients are summed in another order, in bf16


GROUP = 4
ALONE = World(0, 1, 0, 1, "", 0, "alone")


def with_stem(precision: str = "fp32") -> Recipe:
    """A ToST of one layer, and an average."""
    model = {"arch": "tost_tiny_12", "depth": 1, "width": 32, "heads": 2, "image_size": 32, "patch_size": 4}
    train = {"global_batch": GLOBAL_BATCH, "epochs": 1, "precision": precision, "group": GROUP}
    raw = {"name": "stem", "model": model, "optim": {"lr": 2e-4, "ema_decay": DECAY}, "train": train}
    return build_recipe(raw, origin="a test")


def engine_of(settings: Recipe, world: World, device: torch.device, accumulation: int) -> Engine:
    model = build_model(settings.model, 7, seed=0)
    return Engine(model, settings, device, GLOBAL_BATCH // world.world_size // accumulation, accumulation)


def pieces(step: int, world: World, accumulation: int) -> Any:
    return zip(*(t.chunk(accumulation) for t in batch_of(step, world)), strict=True)


def running(engine: Any) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in engine.partitions.buffers()["fp32"].items()}


def with_batch_norm(world: World, device: torch.device, accumulation: int, folder: Path | None) -> dict[str, Any]:
    """Three steps; the buffers after each, and what is to be known of them."""
    engine = engine_of(with_stem(), world, device, accumulation)
    seen = [running(engine)]
    for step in range(3):
        engine.step(pieces(step, world, accumulation), 1e-3, step)
        seen.append(running(engine))
    average = {name: buffer.clone() for name, buffer in engine.partitions.buffers()["ema"].items()}
    with engine.partitions.averaged():
        shown = running(engine)
    if folder:
        state = engine.state(), engine.layouts, Progress(step=3), world
        saving.publish(folder, *state, buffers=engine.partitions.buffers())
    return {"seen": seen, "average": average, "shown": shown, "after": running(engine)}


def same(these: dict[str, torch.Tensor], those: dict[str, torch.Tensor]) -> bool:
    return these.keys() == those.keys() and all(torch.equal(these[name], those[name]) for name in these)


@pytest.mark.spawn
def test_running_statistics_do_not_depend_on_ranks_and_are_averaged_saved_and_taken_up(tmp_path: Path) -> None:
    first, second = spawn(with_batch_norm, 2, 1, tmp_path)
    with fake_cluster(1):
        pieced, whole = (with_batch_norm(ALONE, torch.device("cpu"), n, None) for n in (3, 1))
    mean, count = (f"patch_embed.norms.1.{name}" for name in ("running_mean", "num_batches_tracked"))
    assert not torch.equal(first["seen"][1][mean], first["seen"][0][mean])
    for other in (second, pieced, whole):
        for here, there in zip(first["seen"], other["seen"], strict=True):
            torch.testing.assert_close(here, there)
    expected = first["seen"][0][mean].double()
    for buffers in first["seen"][1:]:
        expected = DECAY * expected + (1 - DECAY) * buffers[mean].double()
    torch.testing.assert_close(first["average"][mean].double(), expected)
    assert first["average"][count] == 3
    assert same(first["shown"], first["average"])
    assert same(first["after"], first["seen"][-1])
    saved = list_checkpoints(tmp_path)[-1]
    assert same({name: saved.weights()[name] for name in first["after"]}, first["after"])
    assert same({name: saved.weights("ema")[name] for name in first["after"]}, first["average"])
    with fake_cluster(1):
        engine = engine_of(with_stem("bf16"), ALONE, torch.device("cpu"), 1)
        engine.partitions.load(saved)
        assert same(engine.partitions.buffers()["fp32"], first["after"])
        assert same(engine.partitions.buffers()["ema"], first["average"])
        module = dict(engine.module.named_buffers())
        assert module[mean].dtype == torch.float32, "though the weights are bf16"
        assert engine.module.get_parameter("patch_embed.norms.1.weight").dtype == torch.bfloat16
        assert torch.equal(module[mean], first["after"][mean])
        plain = make_engine(ALONE, torch.device("cpu"), recipe())
        with pytest.raises(CheckpointError, match="holds another model: "):
            plain.partitions.load(saved)


def test_a_step_that_is_not_finite_changes_no_buffer_and_neither_does_compiling() -> None:
    with fake_cluster(1):
        engine = engine_of(with_stem("bf16"), ALONE, torch.device("cpu"), 1)
        engine.step(pieces(0, ALONE, 1), 1e-3, 0)
        before = running(engine), {name: buffer.clone() for name, buffer in engine.partitions.buffers()["ema"].items()}
        engine._try_passes(GLOBAL_BATCH, 32)
        assert not statistics(engine.module).any()
        engine.module.get_parameter("head.linear.weight").data[0, 0] = float("inf")
        engine.step(pieces(1, ALONE, 1), 1e-3, 1)
        assert same(running(engine), before[0])
        assert same(engine.partitions.buffers()["ema"], before[1])


def test_a_checkpoint_without_an_average_begins_one_and_one_with_it_may_end_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with fake_cluster(1):
        for settings, others, said in (
            (recipe(), recipe(ema_decay=DECAY), "no average of the weights: it begins with the weights there"),
            (recipe(ema_decay=DECAY), recipe(), "optim.ema_decay is 0: it ends"),
        ):
            engine = make_engine(ALONE, torch.device("cpu"), settings)
            take_steps(engine, ALONE, 0, 1)
            folder = tmp_path / str(settings.optim.ema_decay)
            saved = saving.publish(folder, engine.state(), engine.layouts, Progress(step=1), ALONE)
            resuming = make_engine(ALONE, torch.device("cpu"), others)
            resuming.partitions.load(saved)
            assert said in caplog.text
            state = resuming.state()
            assert torch.equal(state.get("ema", state["fp32"])[0], engine.state()["fp32"][0])
            assert (resuming.partitions.average is not None) == bool(others.optim.ema_decay)


def test_an_average_of_older_weights_does_not_stay_beside_newer_ones_that_have_none(
    tmp_path: Path, cast_shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder, train = RunFolder(tmp_path), ShardIndex.load(cast_shards / "train")
    with fake_cluster(1):
        for step, settings in ((1, recipe(ema_decay=DECAY)), (2, recipe())):
            engine = make_engine(ALONE, torch.device("cpu"), settings)
            saving.publish(folder.checkpoints, engine.state(), engine.layouts, Progress(step=step), ALONE)
            # The best is of step 1 as before, which keeps its average.
            progress = Progress(step=step, best_step=1)
            export(folder, settings, engine.module.config, progress, 1.0, train, None, Tenure())
            files = {path.name for path in tmp_path.glob("model-*")}
            average = {"model-last-ema.pt", "model-last-ema.md"}
            assert files >= {"model-last.pt", "model-last.md", "model-best-ema.pt", "model-best-ema.md"}
            assert files & average == (average if step == 1 else set())
    assert "model-last-ema.pt was an average of older weights, and is removed: step 2 has none" in caplog.text


def test_a_run_too_short_for_its_average_is_told(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_short_run(0.99996, 400_000)
    warn_of_short_run(0.0, 10)
    assert not caplog.text
    warn_of_short_run(0.99996, 1_000)
    assert "averages over about the last 25,000 steps, and the run has 1,000: 96 %" in caplog.text
