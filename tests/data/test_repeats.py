"""Repeated augmentation: every sample as often as asked for, and never two of its views in a group."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import crate_dist
from crate_dist.config import load_recipe
from crate_dist.data.loader import Share, TrainBatches, TrainLoader, train_transform
from crate_dist.data.order import Order, training_order
from crate_dist.data.repeats import Repeats
from crate_dist.training.optim import Schedule

GOLDEN_SAMPLES = [0, 1, 0, 1, 6, 7, 6, 7, 2, 3, 2, 3, 5, 4, 5, 4]
GOLDEN_REPEATS = [0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1]


@st.composite
def repeated_orders(draw: st.DrawFn) -> Order:
    sizes = draw(st.lists(st.integers(1, 60), min_size=1, max_size=12))
    batch = draw(st.integers(1, sum(sizes)))  # fewer samples than a batch are refused
    group = draw(st.sampled_from([n for n in range(1, batch + 1) if batch % n == 0]))
    lanes = draw(st.sampled_from([n for n in range(1, min(batch, 16) + 1) if batch % n == 0]))
    repeats = Repeats(draw(st.integers(2, 5)), group, batch)
    return Order(sizes, draw(st.integers(0, 2**40)), lanes, draw(st.integers(1, 50)), repeats)


@settings(max_examples=100, deadline=None)
@given(repeated_orders(), st.integers(0, 3))
def test_every_epoch_visits_every_sample_as_often_and_each_view_once(order: Order, epoch: int) -> None:
    size = order.repeats.count * order.num_samples
    samples, epochs, repeats = order.views(np.arange(epoch * size, (epoch + 1) * size))
    assert set(epochs) == {epoch}
    every_view = np.indices((order.num_samples, order.repeats.count)).reshape(2, -1)
    assert np.array_equal(np.stack([samples, repeats])[:, np.lexsort((repeats, samples))], every_view)


@settings(max_examples=150, deadline=None)
@given(repeated_orders())
def test_no_group_of_any_step_holds_two_views_of_a_sample_in_an_epoch(order: Order) -> None:
    """Every step of two epochs and what follows: batches that begin in one epoch and end in the next are among them."""
    batch, group = order.repeats.global_batch, order.repeats.group
    steps = 2 * order.epoch_size // batch + 2
    samples, epochs, _ = order.views(np.concatenate([order.batch_positions(step, batch) for step in range(steps)]))
    members = np.sort((epochs * order.num_samples + samples).reshape(-1, group))
    assert (np.diff(members) > 0).all()


@settings(max_examples=50, deadline=None)
@given(repeated_orders(), st.integers(0, 500), st.integers(1, 200))
def test_a_resume_at_any_position_continues_the_same_views(order: Order, position: int, count: int) -> None:
    whole = order.views(np.arange(position + count))
    resumed = order.views(np.arange(position, position + count))
    assert all(np.array_equal(a[position:], b) for a, b in zip(whole, resumed, strict=True))


def test_the_views_of_a_sample_are_in_one_batch_or_two_that_follow_each_other() -> None:
    """ToST's batch of 1024 in groups of 128, nor does a rank read many lanes at a time."""
    order = Order([1250] * 34, seed=1, lanes=64, repeats=Repeats(3, 128, 1024))
    samples, _, _ = order.views(np.arange(order.epoch_size))
    places = np.argsort(samples, kind="stable").reshape(-1, 3) // 1024
    steps = places[:, 2] - places[:, 0]
    assert steps.max() == 1
    assert (steps == 0).mean() > 0.6
    base, _ = order.repeats.views(np.arange(order.epoch_size), order.num_samples, order.lanes)
    shares = base[: order.epoch_size // 128 * 128].reshape(-1, 128) % 64  # of eight ranks
    assert np.mean([len(set(lanes)) for lanes in shares]) < 40


def test_without_repeats_nothing_is_changed() -> None:
    plain, once = (Order([30, 50, 20], 7, 8, 16, repeats) for repeats in (Repeats(), Repeats(1, 20, 40)))
    for step in range(6):
        positions = plain.batch_positions(step, 40)
        assert np.array_equal(once.batch_positions(step, 40), positions)
        assert np.array_equal(once.samples(positions), plain.samples(positions))
        assert not once.views(positions).repeats.any()


def test_an_order_with_repeats_never_changes_between_versions() -> None:
    """Golden values: a change here breaks the resume of every run that is under way."""
    samples, _, repeats = Order([3, 5], 11, 2, 3, Repeats(2, 2, 8)).views(np.arange(16))
    assert (samples.tolist(), repeats.tolist()) == (GOLDEN_SAMPLES, GOLDEN_REPEATS)


def test_too_few_samples_for_a_group_are_refused() -> None:
    with pytest.raises(ValueError, match="3 samples cannot fill a group of 4 without a repeat"):
        Order([3], 0, 1, 4, Repeats(2, 4, 4)).samples(np.arange(6))


def test_each_view_has_pixels_of_its_own_at_any_number_of_ranks_workers_and_after_a_resume(
    cast_shards: Path, small_recipe: Path
) -> None:
    recipe = load_recipe(small_recipe, ["order.repeats=3", "train.seed=3"])
    index, batch = crate_dist.Shards(cast_shards / "train").index, recipe.train.global_batch
    order = training_order(index.shard_sizes, recipe)
    transform = train_transform(recipe.augment, recipe.images, recipe.model.image_size)
    assert order.epoch_size == 600

    def steps(ranks: int, workers: int, first: int, count: int) -> list[torch.Tensor]:
        shares = [Share(rank, ranks, batch, batch // ranks) for rank in range(ranks)]
        loaders = [TrainLoader(index, order, share, transform, workers, first) for share in shares]
        return [torch.cat([next(loader).images.clone() for loader in loaders]) for _ in range(count)]

    whole = steps(ranks=1, workers=0, first=0, count=4)
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], steps(ranks=2, workers=1, first=2, count=2), strict=True))
    samples = TrainBatches(index, order, Share(0, 1, batch, batch), transform, 1).samples(0)
    views: dict[int, list[torch.Tensor]] = {}
    for sample, pixels in zip(samples.tolist(), whole[0], strict=True):
        views.setdefault(sample, []).append(pixels)
    several = [found for found in views.values() if len(found) > 1]
    assert several
    assert not any(torch.equal(a, b) for found in several for a, b in itertools.combinations(found, 2))


def test_an_epoch_has_as_many_steps_as_views(small_recipe: Path) -> None:
    recipe = load_recipe(small_recipe, ["order.repeats=3", "train.max_steps=1000000"])
    batch, epochs = recipe.train.global_batch, recipe.train.epochs
    last = recipe.train.last_step(recipe.order.repeats * 200)
    assert last == -(-epochs * 600 // batch) == Schedule(epochs, 600, batch).total_steps
