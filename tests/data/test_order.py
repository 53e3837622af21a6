"""The order of samples is a pure function of (seed, epoch, position)."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_dist.data.loader import Share
from crate_dist.data.order import Order, hash64, permutation

shard_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=30)
GOLDEN_SAMPLES = [0, 6, 1, 5, 2, 7, 8, 4, 9, 3, 10, 11, 9, 2, 10, 1, 8, 0, 4, 7, 3, 5, 11, 6]
GOLDEN_HASH = [6161369366696016980]
orders = st.builds(Order, shard_sizes, seed=st.integers(0, 2**40), lanes=st.integers(1, 12), window=st.integers(1, 50))


@settings(max_examples=200, deadline=None)
@given(orders, st.integers(0, 3))
def test_every_epoch_visits_every_sample_exactly_once(order: Order, epoch: int) -> None:
    n = order.num_samples
    samples = order.samples(np.arange(epoch * n, (epoch + 1) * n))
    assert np.array_equal(np.sort(samples), np.arange(n))


@settings(max_examples=100, deadline=None)
@given(orders, st.integers(1, 6), st.integers(1, 4), st.data())
def test_global_batches_are_the_same_at_1_2_4_and_8_ranks(
    order: Order, batch_in_eights: int, steps: int, data: st.DataObject
) -> None:
    global_batch = 8 * batch_in_eights

    def batches(world_size: int) -> np.ndarray:
        share_size = global_batch // world_size
        micro = data.draw(st.sampled_from([m for m in range(1, share_size + 1) if share_size % m == 0]))
        ranks = []
        for rank in range(world_size):
            share = Share(rank, world_size, global_batch, micro)
            numbers = range(steps * share.accumulation)
            ranks.append(np.concatenate([share.positions(order, n) for n in numbers]).reshape(steps, -1))
        return np.concatenate(ranks, axis=1)

    one = batches(1)
    assert all(
        np.array_equal(np.sort(one[s]), np.arange(s * global_batch, (s + 1) * global_batch)) for s in range(steps)
    )
    for world_size in (2, 4, 8):
        assert np.array_equal(batches(world_size), one)


@settings(max_examples=100, deadline=None)
@given(orders, st.integers(0, 500), st.integers(1, 100))
def test_a_resume_at_any_position_continues_the_same_sequence(order: Order, position: int, count: int) -> None:
    whole = order.samples(np.arange(position + count))
    fresh = Order(order.shard_sizes, order.seed, order.lanes, order.window)
    assert np.array_equal(fresh.samples(np.arange(position, position + count)), whole[position:])


@given(st.integers(0, 2**40), st.integers(0, 100))
def test_epochs_and_seeds_have_different_orders(seed: int, epoch: int) -> None:
    n = 1000
    order, other = Order([100] * 10, seed), Order([100] * 10, seed + 1)
    now = order.samples(np.arange(epoch * n, (epoch + 1) * n))
    assert not np.array_equal(now, order.samples(np.arange((epoch + 1) * n, (epoch + 2) * n)))
    assert not np.array_equal(now, other.samples(np.arange(epoch * n, (epoch + 1) * n)))


def test_an_order_never_changes_between_versions() -> None:
    """Golden values: a change here breaks the resume of every run that is under way."""
    order = Order([3, 5, 4], seed=11, lanes=2, window=3)
    assert order.samples(np.arange(24)).tolist() == GOLDEN_SAMPLES
    assert hash64(1, 2, 3).tolist() == GOLDEN_HASH


def test_a_rank_reads_few_shards_and_reads_them_whole() -> None:
    order = Order([100] * 64, seed=0, lanes=8, window=200)
    global_batch, world_size = 64, 8
    share = Share(3, world_size, global_batch, 8)
    steps = order.num_samples // global_batch
    shards = [set(order.samples(share.positions(order, s)) // 100) for s in range(steps)]
    touched = set().union(*shards)
    assert len(touched) <= 64 // 8 + 1
    first_and_last = {shard: [s for s in range(steps) if shard in shards[s]] for shard in touched}
    # A shard of 100 samples at 8 a step is spread over no more than the windows that it can lie in.
    assert all(seen[-1] - seen[0] <= 2 * 200 / 8 for seen in first_and_last.values())


def test_the_hash_has_no_visible_bias() -> None:
    values = hash64(0, np.arange(100_000))
    bits = (values[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.01
    assert len(np.unique(values)) == 100_000
    assert np.array_equal(np.sort(permutation(1000, 5)), np.arange(1000))
