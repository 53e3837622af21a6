"""Batches come to a GPU whole and beside the computing, in memory that is let go in order."""

from __future__ import annotations

import functools
import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from crate_dist.data.feed import Feed
from crate_dist.data.index import ShardIndex
from crate_dist.data.loader import HELD_BATCHES, Batch, Share, TrainLoader, eval_loader
from crate_dist.data.order import Order
from crate_dist.data.transforms import EvalTransform, TrainTransform
from tests.pretended_gpu import (
    DEVICE,
    Policy,
    PretendedGpu,
    at_once,
    at_random,
    copies_first,
    late,
    pretended_gpu,
)

SIZE, BATCH, STEPS = 8, 10, 15

POLICIES = {"late": late, "at_once": at_once, "copies_first": copies_first} | {
    f"random_{seed}": at_random(seed) for seed in range(5)
}


@pytest.fixture(scope="module")
def index(cast_shards: Path) -> ShardIndex:
    return ShardIndex.load(cast_shards / "train")


def loader(index: ShardIndex) -> TrainLoader:
    """Writes a slot again as early as it may: where a worker would write beside the rank, this writes at once."""
    order = Order(index.shard_sizes, seed=3, lanes=4, window=16)
    made = TrainLoader(index, order, Share(0, 1, BATCH, BATCH), TrainTransform(SIZE), workers=0)
    assert len(made.slots) == HELD_BATCHES
    return made


def seen_by_the_device(gpu: PretendedGpu, batches: Iterator[Batch], count: int | None = None) -> list[Batch]:
    """What a kernel that is started after each batch was handed over finds in the batch's memory when it runs."""
    seen: list[Batch] = []

    def look(images: torch.Tensor, labels: torch.Tensor) -> None:
        seen.append(Batch(images.clone(), labels.clone()))

    for batch in itertools.islice(batches, count):
        images, labels = batch.images.detach(), batch.labels.detach()
        gpu.launch(functools.partial(look, images, labels))
    gpu.finish()
    return seen


def assert_same(batches: list[Batch], expected: list[Batch]) -> None:
    for found, wanted in zip(batches, expected, strict=True):
        assert torch.equal(found.images, wanted.images)
        assert torch.equal(found.labels, wanted.labels)


@pytest.fixture(scope="module")
def expected(index: ShardIndex) -> list[Batch]:
    return [batch._replace(images=batch.images.clone()) for batch in itertools.islice(loader(index), STEPS)]


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("failing", [(), ("cudaHostRegister",)], ids=["pinned", "not_pinned"])
def test_no_memory_is_written_before_it_was_read(
    index: ShardIndex, expected: list[Batch], policy: Policy, failing: tuple[str, ...]
) -> None:
    """Neither a slot before its copy is done, nor the device's memory before the step is done with it."""
    with pretended_gpu(policy, failing) as gpu:
        assert_same(seen_by_the_device(gpu, Feed(loader(index), DEVICE), STEPS), expected)
        assert gpu.blocking == []
        assert gpu.host_waits <= STEPS


@pytest.mark.parametrize("failing", [(), ("cudaHostRegister",)], ids=["pinned", "not_pinned"])
def test_the_host_runs_some_batches_ahead_and_the_memory_on_the_device_does_not_grow(
    index: ShardIndex, failing: tuple[str, ...]
) -> None:
    images = torch.empty(BATCH, SIZE, SIZE, 3, dtype=torch.uint8).nbytes
    with pretended_gpu(late, failing) as gpu:
        done: list[int] = []
        for step, _ in enumerate(itertools.islice(Feed(loader(index), DEVICE), STEPS)):
            assert step - len(done) <= HELD_BATCHES + 1
            assert step < HELD_BATCHES or step - len(done) >= HELD_BATCHES - 1, "the device would run dry"
            gpu.launch(functools.partial(done.append, step))
        assert done == list(range(len(done)))
        assert gpu.most_held <= 3 * (images + 8 * BATCH)


def test_evaluation_is_fed_every_batch_the_last_one_too(cast_shards: Path) -> None:
    index = ShardIndex.load(cast_shards / "val")

    def batches() -> Iterator[Batch]:
        return iter(eval_loader(index, 0, 1, EvalTransform(SIZE, SIZE), 8, workers=2))

    for policy in POLICIES.values():
        with pretended_gpu(policy) as gpu:
            found = seen_by_the_device(gpu, Feed(batches(), DEVICE))
            assert gpu.blocking == []
        assert_same(found, list(batches()))
        assert [len(batch.labels) for batch in found] == [8, 8, 8, 8, 5]
    with pretended_gpu():
        assert list(Feed(iter(()), DEVICE)) == []


def test_on_a_cpu_batches_are_the_loader_s(index: ShardIndex, expected: list[Batch]) -> None:
    batches = loader(index)
    for found, wanted in zip(Feed(batches, torch.device("cpu")), expected, strict=False):
        assert found.images.untyped_storage().data_ptr() == batches.slots.data_ptr()
        assert torch.equal(found.labels, wanted.labels)


def test_memory_that_cannot_be_pinned_is_said_and_leaves_no_error_behind(
    index: ShardIndex, caplog: pytest.LogCaptureFixture
) -> None:
    with pretended_gpu(failing=("cudaHostRegister",)) as gpu:
        feed = Feed(loader(index), DEVICE)
        assert gpu.last_error == 0
        torch.zeros(1, device=DEVICE)
        del feed
        assert [name for name, *_ in gpu.calls] == ["cudaHostRegister"], "what was not locked is not let go"
    assert [record.getMessage() for record in caplog.records] == [
        "the loader's memory could not be pinned (the error 712); batches are copied once more on their way"
    ]


@pytest.mark.parametrize("failing", [(), ("cudaHostUnregister",)], ids=["", "though_it_fails"])
def test_pinned_memory_is_let_go_before_its_mapping_and_after_its_copies(
    index: ShardIndex, failing: tuple[str, ...]
) -> None:
    with pretended_gpu(late, failing) as gpu:
        feed = Feed(batches := loader(index), DEVICE)
        next(feed)
        place = batches.slots.data_ptr(), batches.slots.nbytes
        assert gpu.calls == [("cudaHostRegister", *place, 0)]
        del feed, batches
        assert gpu.calls[1:] == [("synchronize",), ("cudaHostUnregister", place[0])]
        assert gpu.last_error == 0


def test_pinned_memory_is_let_go_after_an_error_and_by_its_own_process_alone(index: ShardIndex) -> None:
    def step() -> None:
        feed = Feed(loader(index), DEVICE)
        next(feed)
        child = os.fork()
        if child == 0:
            del feed
            os._exit(len(gpu.calls))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == len(gpu.calls) == 1
        raise RuntimeError("of the step")

    with pretended_gpu() as gpu:
        with pytest.raises(RuntimeError, match="of the step"):
            step()
        gc.collect()
        assert [name for name, *_ in gpu.calls] == ["cudaHostRegister", "synchronize", "cudaHostUnregister"]
