"""The training step on ZeRO-2, at one and several ranks, against golden values and plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from crate_dist.checkpoint import loading as checkpoint
from crate_dist.checkpoint import saving
from crate_dist.checkpoint.format import Progress
from crate_dist.config import Recipe, build_recipe
from crate_dist.world import World
from tests.ranks import spawn

pytestmark = pytest.mark.spawn

GOLDEN = Path(__file__).parents[1] / "golden" / "crate_parity.pt"
GLOBAL_BATCH = 24


def recipe(**optim: Any) -> Recipe:
    return build_recipe(
        {
            "name": "engine",
            "model": {"arch": "crate_demo", "image_size": 32, "patch_size": 8},
            "images": {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]},
            "optim": {"lr": 2e-4, "weight_decay": 0.05, **optim},
            "train": {"global_batch": GLOBAL_BATCH, "epochs": 1, "precision": optim.pop("precision", "bf16")},
        },
        origin="a test",
    )


def golden_losses(world: World, device: torch.device, accumulation: int) -> list[float]:
    """Twelve Lion steps of the golden model through the engine, without clipping, in fp32."""
    from crate_dist.models.config import ModelConfig
    from crate_dist.models.transformer import Transformer
    from crate_dist.models.weights.names import from_reference
    from crate_dist.training.engine import Engine

    golden = torch.load(GOLDEN, weights_only=True)
    given, training = dict(golden["config"]), golden["train"]
    given.pop("dim_head")
    model = Transformer(ModelConfig(**given))
    model.load_state_dict(from_reference(golden["state_dict"]))
    images, labels = training["images"], training["labels"]
    settings = recipe(
        lr=training["lr"],
        weight_decay=training["weight_decay"],
        label_smoothing=training["label_smoothing"],
        grad_clip=0,
    )
    settings = settings.model_copy(
        update={"train": settings.train.model_copy(update={"precision": "fp32", "global_batch": images.shape[1]})}
    )
    micro = images.shape[1] // (world.world_size * accumulation)
    engine = Engine(model, settings, device, micro, accumulation)
    engine._normalize = lambda chunk: chunk  # type: ignore[assignment]  # the golden images are numbers already
    losses = []
    for step in range(len(images)):
        mine = slice(world.rank * micro * accumulation, (world.rank + 1) * micro * accumulation)
        parts = zip(images[step, mine].split(micro), labels[step, mine].split(micro), strict=True)
        result = engine.step(parts, training["lr"], step)
        torch.distributed.all_reduce(result.loss)
        losses.append(result.loss.item() / world.world_size)
    return losses


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 1), (2, 2)])
def test_twelve_lion_steps_have_the_losses_of_the_published_code(world_size: int, accumulation: int) -> None:
    expected = torch.load(GOLDEN, weights_only=True)["train"]["losses"]
    for losses in spawn(golden_losses, world_size, accumulation):
        assert losses == pytest.approx(expected, abs=1e-4)


def batch_of(step: int, world: World) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank's share of random images and labels."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (GLOBAL_BATCH, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 7, (GLOBAL_BATCH,), generator=generator)
    share = GLOBAL_BATCH // world.world_size
    mine = slice(world.rank * share, (world.rank + 1) * share)
    return images[mine], labels[mine]


def make_engine(world: World, device: torch.device, settings: Recipe) -> Any:
    from crate_dist.models.build import build_model
    from crate_dist.training.engine import Engine

    return Engine(build_model(settings.model, 7, seed=0), settings, device, GLOBAL_BATCH // world.world_size, 1)


def take_steps(engine: Any, world: World, first: int, stop: int) -> None:
    for step in range(first, stop):
        engine.step(iter([batch_of(step, world)]), 1e-3, step)


def train_and_save(world: World, device: torch.device, settings: Recipe, folder: Path) -> None:
    engine = make_engine(world, device, settings)
    take_steps(engine, world, 0, 3)
    saving.publish(folder, engine.state(), engine.layouts, Progress(step=3), world)


def load_and_save(world: World, device: torch.device, settings: Recipe, source: Path, target: Path) -> int:
    engine = make_engine(world, device, settings)
    found = checkpoint.find_newest(source, world)
    assert found is not None
    engine.partitions.load(found)
    saving.publish(target, engine.state(), engine.layouts, found.progress, world)
    # The weights of the products are the master weights, rounded.
    master = found.weights()
    rounded = all(torch.equal(p, master[n].to(p.dtype)) for n, p in engine.module.named_parameters())
    take_steps(engine, world, 3, 4)  # and the optimizer goes on from there
    assert rounded
    return sum(p.numel() for p in engine.module.parameters())


@pytest.mark.parametrize(
    ("optim", "world_sizes"),
    [({"name": "lion"}, (1, 3, 4)), ({"name": "adamw", "decay": "matrices", "layer_decay": 0.5}, (2, 8))],
    ids=["lion", "adamw with two groups of each layer"],
)
def test_what_four_ranks_saved_any_number_of_ranks_holds_bit_for_bit(
    tmp_path: Path, optim: dict[str, Any], world_sizes: tuple[int, ...]
) -> None:
    settings = recipe(**optim)
    spawn(train_and_save, 4, settings, tmp_path / "four")
    before = checkpoint.list_checkpoints(tmp_path / "four")[0]
    for world_size in world_sizes:
        target = tmp_path / str(world_size)
        spawn(load_and_save, world_size, settings, tmp_path / "four", target)
        after = checkpoint.list_checkpoints(target)[0]
        assert after.manifest.world_size == world_size
        for kind in before.manifest.kinds:
            for group, layout in enumerate(before.manifest.groups):
                a, b = torch.empty(layout.numel), torch.empty(layout.numel)
                before.reader().copy(kind, group, 0, a)
                after.reader().copy(kind, group, 0, b)
                assert torch.equal(a, b)
                assert a.abs().sum() > 0


def gradients_in_fp32(world: World, device: torch.device) -> tuple[float, float]:
    """Gradient norms of the same batch at once and in eight pieces, in bf16."""
    from crate_dist.models.build import build_model
    from crate_dist.training.engine import Engine

    norms = []
    for accumulation in (1, 8):
        settings = recipe()
        micro = GLOBAL_BATCH // accumulation
        engine = Engine(build_model(settings.model, 7, seed=0), settings, device, micro, accumulation)
        pieces = zip(*(tensor.split(micro) for tensor in batch_of(0, world)), strict=True)
        assert engine._zero.gradient_accumulation_dtype == torch.float32
        norms.append(engine.step(pieces, 1e-3, 0).grad_norm.item())
    return norms[0], norms[1]


def test_accumulation_does_not_change_the_gradient() -> None:
    whole, pieces = spawn(gradients_in_fp32, 1)[0]
    assert pieces == pytest.approx(whole, rel=0.01)


def first_weights(world: World, device: torch.device) -> bool:
    engine = make_engine(world, device, recipe())
    from crate_dist.models.build import build_model

    exact = torch.cat([p.reshape(-1) for p in build_model(recipe().model, 7, seed=0).parameters()])
    part = engine.state()["fp32"][0]
    start = world.rank * len(part)
    expected = exact[start : start + len(part)]
    return torch.equal(part[: len(expected)], expected.detach())


def test_master_weights_start_unrounded() -> None:
    assert spawn(first_weights, 2) == [True, True]


def clipped(world: World, device: torch.device, largest: float) -> tuple[float, float]:
    """The norm of the first gradient, and that of the momentum after it, over all ranks."""
    engine = make_engine(world, device, recipe(grad_clip=largest))
    result = engine.step(iter([batch_of(0, world)]), 1e-3, 0)
    squares = engine.state()["exp_avg"][0].square().sum()
    torch.distributed.all_reduce(squares)
    return result.grad_norm.item(), squares.sqrt().item()


@pytest.mark.parametrize("largest", [0.0, 0.25, 1e6])
def test_gradients_are_clipped_to_the_largest_norm(largest: float) -> None:
    for norm, momentum in spawn(clipped, 2, largest):
        assert norm > 0.5
        assert momentum == pytest.approx(0.01 * (min(norm, largest) if largest else norm), rel=1e-3)
