"""Shards as a map-style data set, for any DataLoader: as they lie, in the order of training, or as a run saw them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from crate_dist.config import DataSection, Recipe
from crate_dist.data.decode import BadImage, Pixels, open_image, reason, rgb
from crate_dist.data.index import INDEX_JSON, ShardError, ShardIndex
from crate_dist.data.loader import Normalize, assemble, train_transform
from crate_dist.data.order import Int64, Views, training_order
from crate_dist.data.reader import ShardReader
from crate_dist.data.splits import open_split
from crate_dist.data.transforms import sample_rng
from crate_dist.locations import location, redacted


class Shards(Dataset[tuple[Any, int]]):
    """One split of shards: item n is (picture, label) of sample n, in the order of the index.

    place: the split's folder or URL, such as /data/imagenet-shards/train
    transform: is given each picture, an RGB image of Pillow's, and makes the item of it; None: the picture itself.
    `model.preprocess` does, and so do torchvision's.

    classes: ids in the order of the labels; class_names: the same for people; labels: int64 (samples,)
    Raises ShardError: no such split, or a damaged one.
    """

    def __init__(self, place: str | Path, transform: Callable[[Image.Image], Any] | None = None) -> None:
        self.index, self.transform = _open(place), transform
        self.classes, self.class_names = tuple(self.index.classes), tuple(self.index.class_names)
        self.labels: Int64 = self.index.rows["label"].astype(np.int64)
        self._readers = _Readers(self.index)

    def __len__(self) -> int:
        return self.index.num_samples

    def __getitem__(self, sample: int) -> tuple[Any, int]:
        """Raises IndexError; BadImage, with the sample's name, for one that does not decode."""
        sample = _within(sample, len(self))
        reader = self._readers.mine()
        try:
            picture = _decoded(reader.read(sample))
        except BadImage as error:
            bad = reader.describe(sample, str(error))
            raise BadImage(f"{bad.key} of {self.index.place}/{bad.shard}: {bad.reason}") from error
        return self.transform(picture) if self.transform else picture, int(self.labels[sample])

    def order(self, recipe: Recipe, epoch: int = 0) -> list[int]:
        """Returns the samples in the order in which a run of the recipe sees them in an epoch: a DataLoader's sampler.

        Every sample is there order.repeats times. Neither the number of GPUs nor that of workers has a say in it.
        """
        return _views(self.index, recipe, epoch).samples.tolist()

    def as_trained(self, recipe: Recipe, epoch: int = 0) -> AsTrained:
        """Returns the data set whose item n is what a run of the recipe sees at position n of an epoch."""
        return AsTrained(self.index, recipe, epoch)


class AsTrained(Dataset[tuple[Tensor, int]]):
    """An epoch as a run trains on it, bit for bit: in its order, cropped and augmented as there, and normalised.

    Item n is (fp32 (3, image_size, image_size), label). A DataLoader without shuffle and with the recipe's global batch
    gives the batches of its steps, each in an order of its own. A sample that does not decode is replaced as there.
    """

    def __init__(self, index: ShardIndex, recipe: Recipe, epoch: int) -> None:
        self.index, self.seed, self.epoch = index, recipe.train.seed, epoch
        self.samples, _, self._repeats = _views(index, recipe, epoch)
        self._transform = train_transform(recipe.augment, recipe.images, recipe.model.image_size)
        self._normalize = Normalize(recipe.images.mean, recipe.images.std, torch.device("cpu"), torch.float32)
        self._readers = _Readers(index)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        """Raises IndexError; ShardError where so many samples in a row do not decode that none can stand in."""
        position = _within(position, len(self))
        sample = self.samples[position]
        rng = sample_rng(self.seed, self.epoch, int(sample), int(self._repeats[position]))
        pixels = np.empty((1, self._transform.size, self._transform.size, 3), dtype=np.uint8)

        def decode(data: bytes, _: int, out: Pixels) -> None:
            self._transform(data, rng, out)

        labels, _, _ = assemble(self._readers.mine(), sample[None], pixels, decode)
        return self._normalize(torch.from_numpy(pixels))[0], int(labels[0])


class _Readers:
    """A reader for each process that asks: a loader's workers inherit the data set, and share no descriptor."""

    def __init__(self, index: ShardIndex) -> None:
        self._index = index
        self._mine: tuple[int, ShardReader] | None = None

    def mine(self) -> ShardReader:
        """Returns the reader of this process."""
        if self._mine is None or self._mine[0] != os.getpid():
            self._mine = os.getpid(), ShardReader(self._index)
        return self._mine[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"_index": self._index, "_mine": None}


def _open(place: str | Path) -> ShardIndex:
    given = location(place)
    if isinstance(given, str):
        root, slash, split = given.rstrip("/").rpartition("/")
        if not slash or re.search(r"[{}?#]", given):
            raise ShardError(
                f"Shards takes the URL of a split, such as https://host/shards/train, not {redacted(given)!r}"
            )
        return open_split(root, split, DataSection())
    folder = given.expanduser().absolute()
    splits = sorted(path.parent.name for path in folder.glob(f"*/{INDEX_JSON}"))
    if splits and not (folder / INDEX_JSON).is_file():
        raise ShardError(f"{place} holds the splits {', '.join(splits)}: give one of them, {folder / splits[0]}")
    return open_split(folder.parent, folder.name, DataSection())


def _decoded(data: bytes) -> Image.Image:
    image = open_image(data)
    try:
        picture = rgb(image)
        picture.load()
    except Exception as error:  # Pillow's decoders raise whatever the bytes make them trip over
        raise BadImage(f"does not decode: {reason(error)}") from error
    return picture


def _views(index: ShardIndex, recipe: Recipe, epoch: int) -> Views:
    """Returns an epoch in the recipe's order."""
    order = training_order(index.shard_sizes, recipe)
    return order.views(epoch * order.epoch_size + np.arange(order.epoch_size))


def _within(number: int, count: int) -> int:
    """Returns a number from 0 on, negative ones counted from the end. Raises IndexError, which ends a for-loop."""
    if not -count <= number < count:
        raise IndexError(f"item {number} of {count:,}")
    return number % count
