"""Batches are the same at any number of workers and ranks; what does not decode is replaced and named."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crate_dist.config import AugmentSection, ImageSection
from crate_dist.data.index import ShardError, ShardIndex
from crate_dist.data.loader import Batch, Normalize, Share, TrainLoader, eval_loader, train_transform
from crate_dist.data.order import Order
from crate_dist.data.reader import ShardReader
from crate_dist.data.transforms import EvalTransform, TrainTransform, sample_rng
from tests.conftest import casts, write_split

SIZE = 24


def batches(index: ShardIndex, share: Share, workers: int, step: int = 0, **images: Any) -> TrainLoader:
    order = Order(index.shard_sizes, seed=3, lanes=4, window=16)
    transform = train_transform(AugmentSection(), ImageSection(**images), SIZE)
    return TrainLoader(index, order, share, transform, workers, step)


def take(index: ShardIndex, share: Share, workers: int, count: int, step: int = 0) -> list[Batch]:
    taken = itertools.islice(batches(index, share, workers, step), count)
    return [batch._replace(images=batch.images.clone()) for batch in taken]


@pytest.mark.parametrize("workers", [1, 2])
def test_pixels_are_the_same_at_any_number_of_workers(cast_shards: Path, workers: int) -> None:
    index = ShardIndex.load(cast_shards / "train")
    share = Share(rank=0, world_size=1, global_batch=20, micro_batch=10)
    alone, several = take(index, share, 0, 25), take(index, share, workers, 25)
    for a, b in zip(alone, several, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
    assert alone[0].images.shape == (10, SIZE, SIZE, 3)
    assert alone[0].images.dtype == torch.uint8


@pytest.mark.parametrize("world_size", [2, 4])
def test_pixels_are_the_same_at_any_number_of_ranks(cast_shards: Path, world_size: int) -> None:
    index = ShardIndex.load(cast_shards / "train")
    one = torch.cat([b.images for b in take(index, Share(0, 1, 24, 24), 0, 12)]).view(12, 24, SIZE, SIZE, 3)
    micro = 24 // world_size // 2
    ranks = []
    for rank in range(world_size):
        share = Share(rank, world_size, 24, micro)
        images = torch.cat([b.images for b in take(index, share, 0, 12 * share.accumulation)])
        ranks.append(images.view(12, 24 // world_size, SIZE, SIZE, 3))
    assert torch.equal(torch.cat(ranks, dim=1), one)


def test_a_resume_at_any_step_sees_the_same_pixels(cast_shards: Path) -> None:
    index = ShardIndex.load(cast_shards / "train")
    share = Share(0, 1, 20, 10)
    whole = take(index, share, 0, 30)
    for step in (1, 7, 13):
        resumed = take(index, share, 1, 4, step)
        for a, b in zip(whole[2 * step :], resumed, strict=False):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.labels, b.labels)


def test_the_resize_is_the_recipe_s_in_training_too(cast_shards: Path) -> None:
    index, share = ShardIndex.load(cast_shards / "train"), Share(0, 1, 20, 10)
    reader, loader = ShardReader(index), batches(index, share, 0, resize_filter="bilinear")
    batch = next(loader)
    transform = TrainTransform(SIZE, resize_filter="bilinear")
    for sample, pixels in zip(loader.source.samples(0).tolist(), batch.images.numpy(), strict=True):
        assert np.array_equal(pixels, transform(reader.read(sample), sample_rng(3, 0, sample)))
    assert not torch.equal(batch.images, next(batches(index, share, 0)).images)


def test_epochs_differ_in_their_pixels_and_not_in_their_samples(cast_shards: Path) -> None:
    index = ShardIndex.load(cast_shards / "train")
    both = take(index, Share(0, 1, 200, 200), 0, 2)
    assert torch.equal(both[0].labels.bincount(), both[1].labels.bincount())
    assert not torch.equal(both[0].images, both[1].images)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_sees_every_sample_exactly_once(cast_shards: Path, world_size: int) -> None:
    index = ShardIndex.load(cast_shards / "val")
    labels: list[int] = []
    for rank in range(world_size):
        for batch in eval_loader(index, rank, world_size, EvalTransform(32, 32), 8, workers=0):
            labels += batch.labels.tolist()
    assert labels == index.rows["label"].tolist()


def damaged_split(folder: Path, bad: set[int]) -> ShardIndex:
    def samples() -> Iterator[tuple[str, bytes, int]]:
        for number, (key, image, label) in enumerate(casts(40, seed=5)):
            yield key, (image[: len(image) // 2] if number in bad else image), label

    return write_split(folder, samples(), shard_samples=15, classes=4)


def test_what_does_not_decode_is_replaced_by_a_rule_of_the_sample_alone(tmp_path: Path) -> None:
    index = damaged_split(tmp_path / "train", bad={7, 8, 39})
    one = take(index, Share(0, 1, 40, 40), 0, 1)[0]
    two = [take(index, Share(rank, 2, 40, 20), 0, 1)[0] for rank in (0, 1)]
    assert len(one.images) == 40
    assert torch.equal(torch.cat([b.images for b in two]), one.images)
    assert torch.equal(torch.cat([b.labels for b in two]), one.labels)
    named = {(item.shard, item.key) for item in one.bad}
    assert named == {
        ("train-000000.tar", "000007.png"),
        ("train-000000.tar", "000008.png"),
        ("train-000002.tar", "000039.png"),
    }
    assert all("decode" in item.reason for item in one.bad)
    # 7 and 8 give their slots to 9, the last one its slot to the first.
    counts = np.bincount(one.labels.numpy(), minlength=4)
    assert counts.tolist() == [10 - 1 + 1, 10 + 2, 10, 10 - 2]


def test_a_run_of_undecodable_samples_is_an_error(tmp_path: Path) -> None:
    index = damaged_split(tmp_path / "train", bad=set(range(5, 30)))
    with pytest.raises(ShardError, match="in a row do not decode"):
        take(index, Share(0, 1, 40, 40), 0, 1)


def test_a_shard_that_is_gone_or_too_short_is_an_error_that_names_it(tmp_path: Path) -> None:
    index = damaged_split(tmp_path / "train", bad=set())
    victim = tmp_path / "train" / "train-000001.tar"
    victim.write_bytes(victim.read_bytes()[:2000])
    with pytest.raises(ShardError, match=r"train-000001.tar ends before .*verify.py"):
        take(index, Share(0, 1, 40, 40), 0, 1)
    victim.unlink()
    with pytest.raises(ShardError, match=r"cannot read .*train-000001.tar"):
        take(index, Share(0, 1, 40, 40), 0, 1)


def test_numbers_on_the_device_are_normalised_like_torchvision() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    result = Normalize(mean, std, torch.device("cpu"), torch.float32)(images)
    assert result.shape == (2, 3, 5, 7)
    for channel in range(3):
        expected = (images[..., channel] / 255 - mean[channel]) / std[channel]
        assert torch.allclose(result[:, channel], expected, atol=1e-6)
