"""The moving average of the weights is what its formula says, on any number of ranks, and touches nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from crate_dist.checkpoint import saving
from crate_dist.checkpoint.format import Progress
from crate_dist.checkpoint.loading import list_checkpoints
from crate_dist.config import Recipe
from crate_dist.doctor.fake_cluster import fake_cluster
from crate_dist.world import World
from tests.ranks import spawn
from tests.training.test_engine import batch_of, make_engine, recipe, take_steps

DECAY = 0.75
SAVED_AFTER, STEPS = 2, 4


def with_average(decay: float = DECAY, **optim: Any) -> Recipe:
    return recipe(name="adamw", decay_all=False, ema_decay=decay, **optim)


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
    with engine.averaged():
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
    engine.load(list_checkpoints(folder)[-1])
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
        loaded, alone = resumed(World(0, 1, 0, 1, "", 0, "alone"), torch.device("cpu"), tmp_path)
    by_name = saved.weights("ema")
    assert torch.equal(
        loaded, torch.cat([by_name[n].flatten() for group in saved.manifest.groups for n in group.names])
    )
    torch.testing.assert_close(alone, again, rtol=1e-3, atol=1e-3)  # gradients are summed in another order, in bf16
