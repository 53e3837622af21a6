"""Mixup, cutmix and drop path: equal to what is written out, and the same on any number of ranks and after a resume."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from crate_dist.checkpoint import loading as checkpoint
from crate_dist.checkpoint import saving
from crate_dist.checkpoint.format import Progress
from crate_dist.config import Recipe, RecipeError, build_recipe, load_recipe
from crate_dist.data.index import ShardIndex
from crate_dist.data.loader import Batch, Share, TrainLoader
from crate_dist.data.order import Order
from crate_dist.data.transforms import TrainTransform
from crate_dist.models.residuals.layer import dropped
from crate_dist.training.drop_path import kept
from crate_dist.training.mixing import Mixing, Targets, box_of, partners
from crate_dist.training.samples import TRAINING, training_picture
from crate_dist.world import World
from tests.ranks import spawn

SIDE, CLASSES, GLOBAL_BATCH, GROUP = 32, 4, 24, 6


def recipe(drop_path: float = 0.0, train: dict[str, Any] | None = None, **mix: Any) -> Recipe:
    return build_recipe(
        {
            "name": "mixing",
            "model": {"arch": "crate_demo", "image_size": SIDE, "patch_size": 8, "drop_path": drop_path},
            "mix": {"mixup": 0.8, "cutmix": 1.0, **mix},
            "optim": {"lr": 2e-4, "weight_decay": 0.05},
            "train": {
                **{"global_batch": GLOBAL_BATCH, "group": GROUP, "epochs": 1, "seed": 7, "precision": "fp32"},
                **(train or {}),
            },
        },
        origin="a test",
    )


def random_batch(samples: list[int] | None = None) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (GLOBAL_BATCH, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (GLOBAL_BATCH,), generator=generator)
    return Batch(images, labels, samples=np.array(samples or range(100, 100 + GLOBAL_BATCH)))


def dense(targets: torch.Tensor | Targets, smoothing: float = 0.0) -> torch.Tensor:
    """Targets (n, classes) in fp64, each label smoothed as cross entropy has it."""
    if isinstance(targets, torch.Tensor):
        targets = Targets(targets, targets, 1.0)
    smooth = [F.one_hot(y, CLASSES).double() * (1 - smoothing) + smoothing / CLASSES for y in targets[:2]]
    return targets.share * smooth[0] + (1 - targets.share) * smooth[1]


def test_a_step_draws_the_same_for_ever() -> None:
    drawn = [Mixing(recipe()).draw(step, SIDE) for step in range(6)]
    assert [one.way for one in drawn] == [3, 2, 3, 2, 0, 0]
    assert [one.box for one in drawn] == [None] * 5 + [(9, 32, 7, 32)]
    shares = [0.780614186, 0.838236445, 0.579771568, 0.083103497, 0.320902102, 0.4384765625]
    assert [one.share for one in drawn] == pytest.approx(shares, abs=1e-9)
    assert drawn[0] != Mixing(recipe(train={"seed": 8})).draw(0, SIDE)


def test_shares_boxes_and_choices_are_as_often_as_the_recipe_has_it() -> None:
    draws = [Mixing(recipe(switch=0.3, probability=0.8)).draw(step, SIDE) for step in range(4000)]
    mixed = [one for one in draws if one.share < 1]
    cut = [one for one in mixed if one.box]
    assert len(mixed) / len(draws) == pytest.approx(0.8, abs=0.03)
    assert len(cut) / len(mixed) == pytest.approx(0.3, abs=0.03)
    up = np.array([one.share for one in mixed if not one.box])
    assert up.mean() == pytest.approx(0.5, abs=0.03)
    assert up.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.01)  # of Beta(α, α)
    assert {one.way for one in mixed} == set(range(GROUP - 1))
    assert all(one.box for one in (Mixing(recipe(mixup=0)).draw(step, SIDE) for step in range(20)))
    assert not any(one.box for one in (Mixing(recipe(cutmix=0)).draw(step, SIDE) for step in range(20)))


@given(st.floats(0, 1), st.integers(1, 64), st.data())
def test_the_box_is_an_even_square_of_the_drawn_area_cut_at_the_edges(
    share: float, side: int, data: st.DataObject
) -> None:
    y, x = (data.draw(st.integers(0, side - 1)) for _ in range(2))
    length = 2 * (int(side * np.sqrt(1 - share)) // 2)  # as in the timm that ToST has, and in CRATE-α's code
    inside = np.zeros((3 * side, 3 * side), dtype=bool)
    inside[side + y - length // 2 :, side + x - length // 2 :][:length, :length] = True
    top, bottom, left, right = box_of(share, side, y, x)
    found = np.zeros((side, side), dtype=bool)
    found[top:bottom, left:right] = True
    assert np.array_equal(found, inside[side : 2 * side, side : 2 * side])


def test_mixed_images_and_targets_are_those_of_the_papers_written_out() -> None:
    batch, mixing = random_batch(), Mixing(recipe())
    untouched = batch.images.clone()
    kinds = set()
    for step in range(12):
        draw = mixing.draw(step, SIDE)
        kinds.add(draw.box is None)
        images, targets = mixing.mixed(batch, step)
        assert isinstance(targets, Targets)
        expected, share = np.empty((GLOBAL_BATCH, SIDE, SIDE, 3)), draw.share
        for row, pixels in enumerate(batch.images.double().numpy()):
            first = row // GROUP * GROUP
            other = first + (row - first + 1 + draw.way) % GROUP
            partner = batch.images[other].double().numpy()
            expected[row] = share * pixels + (1 - share) * partner
            if draw.box:
                top, bottom, left, right = draw.box
                expected[row] = pixels
                expected[row, top:bottom, left:right] = partner[top:bottom, left:right]
                share = 1 - (bottom - top) * (right - left) / SIDE**2
            assert targets.others[row] == batch.labels[other]
        assert np.abs(images.double().numpy() - expected).max() <= (0 if draw.box else 1e-4)
        assert (targets.share, torch.equal(targets.labels, batch.labels)) == (share, True)
        assert torch.equal(targets.heavier, dense(targets).argmax(dim=1)) or abs(share - 0.5) < 1e-3
        assert torch.equal(batch.images, untouched), "the loader's memory is not written to"
    assert kinds == {True, False}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_cross_entropy_of_smoothed_soft_targets(smoothing: float) -> None:
    logits = torch.randn(GLOBAL_BATCH, CLASSES, generator=torch.Generator().manual_seed(1))
    labels, others = torch.arange(GLOBAL_BATCH) % CLASSES, torch.arange(GLOBAL_BATCH) // 3 % CLASSES
    targets = Targets(labels, others, 0.3)
    expected = -(dense(targets, smoothing) * F.log_softmax(logits.double(), dim=1)).sum(dim=1).mean()
    assert float(targets.cross_entropy(logits, smoothing)) == pytest.approx(float(expected), rel=1e-6)
    alone = Targets(labels, labels, 0.3).cross_entropy(logits, smoothing)
    assert float(alone) == pytest.approx(float(F.cross_entropy(logits, labels, label_smoothing=smoothing)), rel=1e-6)


@given(st.lists(st.integers(0, 3), min_size=12, max_size=12), st.sampled_from([2, 3, 4, 6, 12]), st.data())
def test_partners_are_of_the_group_and_never_the_same_sample(ids: list[int], group: int, data: st.DataObject) -> None:
    way = data.draw(st.integers(0, group - 2))
    for row, other in enumerate(partners(np.array(ids), group, way).tolist()):
        assert other // group == row // group
        rest = [i for i in range(row // group * group, row // group * group + group) if ids[i] != ids[row]]
        assert other == row if not rest else other in rest
    different = partners(np.arange(12), group, way)
    assert sorted(different.tolist()) == list(range(12)), "each is partner to one"


def test_an_image_without_a_partner_stays_itself_in_every_digit() -> None:
    batch = random_batch([5] * GROUP + list(range(10, 10 + GLOBAL_BATCH - GROUP)))
    for step in range(4):
        images, targets = Mixing(recipe()).mixed(batch, step)
        assert isinstance(targets, Targets)
        assert torch.equal(images[:GROUP].float(), batch.images[:GROUP].float())
        assert torch.equal(targets.others[:GROUP], batch.labels[:GROUP])
        assert not torch.equal(images[GROUP:].float(), batch.images[GROUP:].float())


def test_without_the_section_a_batch_goes_through_as_it_is() -> None:
    batch = random_batch()
    images, labels = Mixing(recipe(mixup=0, cutmix=0)).mixed(batch, 0)
    assert images is batch.images
    assert labels is batch.labels


def test_branches_are_dropped_as_often_as_the_rate_says_and_by_the_place_in_the_global_batch() -> None:
    whole, *parts = (
        kept(0.2, 24, first, count, 3, 5, torch.device("cpu")) for first, count in [(0, 512), (0, 128), (128, 384)]
    )
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert torch.equal(whole.unique(), torch.tensor([0, 1 / 0.8]))
    assert float((whole == 0).float().mean()) == pytest.approx(0.2, abs=0.01)
    other = kept(0.2, 24, 0, 512, 3, 6, torch.device("cpu"))
    assert float(((whole == 0) & (other == 0)).float().mean()) == pytest.approx(0.04, abs=0.01)


def test_a_kept_branch_is_scaled_by_the_factor_itself_in_bf16_too() -> None:
    branch = torch.randn(512, 3, 8).bfloat16()
    factors = kept(0.15, 2, 0, 512, 3, 5, torch.device("cpu"))[0]
    scaled = dropped(branch, factors)
    assert scaled.dtype == torch.bfloat16
    of_kept = factors > 0
    assert not scaled[~of_kept].any()
    ratio = scaled[of_kept].double().abs().sum() / branch[of_kept].double().abs().sum()
    assert float(ratio) == pytest.approx(1 / 0.85, rel=5e-4)  # a factor rounded to bf16 would be 2.7e-3 off
    with torch.autocast("cpu", torch.bfloat16):
        assert dropped(branch, factors).dtype == torch.float32


def test_mixed_training_images_are_shown_with_both_their_classes(cast_shards: Path) -> None:
    index = ShardIndex.load(cast_shards / "train")
    images, targets = Mixing(recipe(cutmix=0)).mixed(random_batch(), 0)
    assert isinstance(targets, Targets)
    (mixed,) = training_picture(images, targets, index).values()
    plain = training_picture(images.round().byte(), targets.labels, index)[TRAINING]
    assert mixed.shape[0] > plain.shape[0], "a line more below each picture"
    first, width = slice(30, 150), min(mixed.shape[1], plain.shape[1])  # below the title, the upper row of pictures
    assert np.array_equal(mixed[first, :width], plain[first, :width])


# What ranks, accumulation and restarts do not change.

Steps = list[tuple[torch.Tensor, torch.Tensor, float]]


def steps(engine: Any, world: World, shards: Path, first: int, stop: int) -> Steps:
    """Trains from step `first` on, by the loader. Of each step: this rank's images, dense targets, and its loss."""
    index = ShardIndex.load(shards)
    share = Share(world.rank, world.world_size, GLOBAL_BATCH, engine.micro_batch)
    order = Order(index.shard_sizes, 7, lanes=4, window=32)
    batches, mixing = TrainLoader(index, order, share, TrainTransform(SIDE), 0, first), Mixing(engine.recipe)
    taken: Steps = []
    for step in range(first, stop):
        mixed = [
            mixing.mixed(batch._replace(images=batch.images.clone()), step)
            for batch in itertools.islice(batches, share.accumulation)
        ]
        loss = engine.step(iter(mixed), 2e-4, step).loss.item()
        images, targets = (torch.cat(part) for part in zip(*((i.float(), dense(t)) for i, t in mixed), strict=True))
        taken.append((images, targets, loss))
    return taken


def make(world: World, device: torch.device, accumulation: int = 1, **train: Any) -> Any:
    from crate_dist.models.build import build_model
    from crate_dist.training.engine import Engine

    settings = recipe(drop_path=0.3, train=train)
    micro = GLOBAL_BATCH // (world.world_size * accumulation)
    return Engine(build_model(settings.model, CLASSES, seed=0), settings, device, micro, accumulation)


def on_this_rank(world: World, device: torch.device, shards: Path, folder: Path) -> dict[str, Steps]:
    if world.world_size > 1:
        return {"accumulated": steps(make(world, device, accumulation=2), world, shards, 0, 4)}
    engine = make(world, device)
    found = {"alone": steps(engine, world, shards, 0, 2)}
    saving.publish(folder, engine.state(), engine.layouts, Progress(step=2), world)
    found["alone"] += steps(engine, world, shards, 2, 4)
    resumed, saved = make(world, device), checkpoint.find_newest(folder, world)
    assert saved is not None
    resumed.partitions.load(saved)
    found["resumed"] = steps(resumed, world, shards, 2, 4)
    found["recomputed"] = steps(make(world, device, recompute=3), world, shards, 0, 2)
    found["autocast"] = steps(make(world, device, precision="autocast"), world, shards, 0, 2)
    return found


@pytest.fixture(scope="module")
def found(cast_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Steps]]:
    """What was trained, by how, and of each rank its part; that of more than one micro-batch was on two ranks."""
    every: dict[str, list[Steps]] = {}
    for ranks in (1, 2):
        parts = spawn(on_this_rank, ranks, cast_shards / "train", tmp_path_factory.mktemp("saved"))
        every |= {name: [part[name] for part in parts] for name in parts[0]}
    return every


@pytest.mark.spawn
def test_neither_ranks_nor_accumulation_change_a_pixel_a_target_or_a_loss(found: dict[str, list[Steps]]) -> None:
    for (images, targets, loss), *parts in zip(*found["alone"], *found["accumulated"], strict=True):
        assert torch.equal(torch.cat([part[0] for part in parts]), images)
        assert torch.equal(torch.cat([part[1] for part in parts]), targets)
        assert sum(part[2] for part in parts) / len(parts) == pytest.approx(loss, abs=1e-4)
    assert len({round(float(targets[0].max()), 6) for _, targets, _ in found["alone"][0]}) > 1, "steps differ"


@pytest.mark.spawn
def test_resumed_or_with_layers_computed_again_the_losses_are_the_same_bit_for_bit(
    found: dict[str, list[Steps]],
) -> None:
    losses = {how: [loss for *_, loss in ranks[0]] for how, ranks in found.items()}
    assert losses["resumed"] == losses["alone"][2:]
    assert losses["recomputed"] == losses["alone"][:2]
    assert losses["autocast"] == pytest.approx(losses["alone"][:2], abs=0.05)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["mix.cutmix=1e308"], r"mix.cutmix.*expected an α from 0.01 to 100, often 0.8 or 1.0, or 0 for none"),
        (["mix.mixup=1e-9"], r"mix.mixup.*expected an α from 0.01 to 100"),
        (["mix.mixup=-1"], r"mix.mixup.*expected an α from 0.01 to 100"),
        (["mix.mixup=0.8"], r"partner among train.group neighbours, which is 1; --set train.group=64 gives it some"),
        (
            ["model.arch=cbt_tiny"],
            r"batch norm, whose statistics are taken over train.group images, which is 1; --set train.group=64",
        ),
        (["model.stem=convolutions", "train.global_batch=6"], r"train.group=2 gives it some, and 2 divide the global"),
        (["train.group=3"], r"global_batch 2048 is no multiple of group 3; 2046 or 2049 would be"),
        (["train.group=512"], r"micro_batch 256 has no room for a group of 512 images.*micro_batch 512 would"),
    ],
)
def test_a_mixing_or_a_group_that_cannot_be_is_refused_with_what_would_do(settings: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe("crate_base", settings)
