"""`crate_dist.Shards`: a split as a data set, also in the order and with the pixels of training."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader

import crate_dist
from crate_dist.config import Recipe, load_recipe
from crate_dist.data.index import ShardError
from crate_dist.data.loader import Normalize, Share, TrainLoader, train_transform
from crate_dist.data.order import Order
from tests.conftest import write_split
from tests.data_prep import picture


@pytest.fixture
def recipe(small_recipe: Path) -> Recipe:
    return load_recipe(small_recipe, ["train.seed=3"])


def test_items_are_pictures_with_their_labels(cast_shards: Path) -> None:
    shards = crate_dist.Shards(cast_shards / "train")
    image, label = shards[5]
    assert (len(shards), image.size, image.mode, label) == (200, (32, 32), "RGB", 1)
    assert label == shards.labels[5]
    assert np.asarray(image)[..., label].mean() > np.asarray(image)[..., 0].mean() + 50, "the picture has another cast"
    assert shards.classes == shards.class_names == ("0", "1", "2", "3")
    assert shards[-1][1] == shards[199][1]
    with pytest.raises(IndexError, match="item 200 of 200"):
        shards[200]


def test_any_loader_reads_them_with_workers_and_without(cast_shards: Path) -> None:
    model = crate_dist.create("demo", classes=4)
    shards = crate_dist.Shards(str(cast_shards / "val"), transform=model.preprocess)
    shards[0]  # its descriptors are this process's
    alone = [torch.cat(part) for part in zip(*DataLoader(shards, batch_size=10), strict=True)]
    beside = [torch.cat(part) for part in zip(*DataLoader(shards, batch_size=10, num_workers=2), strict=True)]
    assert alone[0].shape == (37, 3, 32, 32)
    assert all(map(torch.equal, alone, beside))
    again = pickle.loads(pickle.dumps(crate_dist.Shards(cast_shards / "val")))
    assert again[3][0] == crate_dist.Shards(cast_shards / "val")[3][0]


def test_the_order_of_training_is_an_epochs_sampler(cast_shards: Path, recipe: Recipe) -> None:
    shards = crate_dist.Shards(cast_shards / "train")
    first, second = shards.order(recipe), shards.order(recipe, epoch=1)
    assert sorted(first) == sorted(second) == list(range(200))
    assert first != second
    labels = [label for _, label in DataLoader(shards, batch_size=None, sampler=first)]
    assert labels == shards.labels[first].tolist()


def test_an_epoch_as_trained_has_the_batches_of_its_run(cast_shards: Path, recipe: Recipe) -> None:
    """Two epochs, which meet in a batch."""
    shards, size = crate_dist.Shards(cast_shards / "train"), recipe.train.global_batch
    order = Order(shards.index.shard_sizes, recipe.train.seed, recipe.lanes, recipe.order.window)
    transform = train_transform(recipe.augment, recipe.images, recipe.model.image_size)
    run = TrainLoader(shards.index, order, Share(0, 1, size, size), transform, workers=0)
    normalize = Normalize(recipe.images.mean, recipe.images.std, torch.device("cpu"), torch.float32)
    epochs: ConcatDataset[Any] = ConcatDataset([shards.as_trained(recipe, epoch) for epoch in (0, 1)])
    for step, (images, labels) in enumerate(DataLoader(epochs, batch_size=size, drop_last=True)):
        batch, place = next(run), order.batch_positions(step, size) - step * size
        assert torch.equal(images[place], normalize(batch.images))
        assert torch.equal(labels[place], batch.labels)
    assert not torch.equal(epochs[0][0], epochs[200 + shards.order(recipe, 1).index(shards.order(recipe)[0])][0])


def test_a_picture_that_does_not_decode_is_named_and_replaced_as_in_training(tmp_path: Path, recipe: Recipe) -> None:
    samples = ((f"s{n}", b"no image" if n == 2 else picture(n, (9, 9), format="PNG"), n % 2) for n in range(6))
    write_split(tmp_path / "train", samples, shard_samples=6, classes=2)
    shards = crate_dist.Shards(tmp_path / "train")
    with pytest.raises(ValueError, match=r"s2.png of \S+train-000000.tar: not an image"):
        shards[2]
    trained, place = shards.as_trained(recipe), shards.order(recipe).index(2)
    assert trained[place][1] == shards.labels[3]


def test_what_is_no_split_is_told_where_one_is(cast_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=rf"holds the splits train, val: give one of them, {cast_shards}/train"):
        crate_dist.Shards(cast_shards)
    with pytest.raises(ShardError, match="image_folder"):
        crate_dist.Shards(tmp_path)
    with pytest.raises(ShardError, match="URL of a split, such as"):
        crate_dist.Shards("pipe:cat")
    with pytest.raises(ShardError, match="URL of a split") as told:
        crate_dist.Shards("https://me:hunter2@host/shards/train?signature=5ecret")
    assert not {"hunter2", "5ecret"} & set(re.findall(r"\w+", str(told.value)))
