"""The loaders that benchmarks/data.py compares: each is a function to an iterator of training batches, or missing.

All but ours and FFCV's decode with Pillow and give float32 batches (n, 3, 224, 224), normalised, as torchvision's
reference training does. A package that cannot be imported raises ImportError (torchvision: RuntimeError) here and is a
line "not installed" there.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from published import Folder, Normalise, class_folders, random_crop
from torch.utils.data import DataLoader, Dataset, RandomSampler

from crate_dist.config import AugmentSection, ImageSection
from crate_dist.data.index import ShardIndex
from crate_dist.data.loader import Share, TrainLoader
from crate_dist.data.order import Order
from crate_dist.data.transforms import TrainTransform
from crate_dist.prep.images import ImageOptions, transcode

SIZE = 224
LANES = 4
_AUGMENT, _NORMALISE = AugmentSection(), Normalise(ImageSection())

Contestant = Callable[[Path, int, int], Iterator[Any]]
"""(what prepare left, batch, workers) -> batches without end"""


def ours(shards: Path, batch: int, workers: int) -> Iterator[Any]:
    """Starts the project's own loader: index, order, DataLoader; uint8 batches, normalised on the device."""
    index = ShardIndex.load(shards / "train")
    order = Order(index.shard_sizes, seed=0, lanes=LANES)
    return TrainLoader(index, order, Share(0, 1, batch, batch), TrainTransform(SIZE), workers)


def pillow_crop(image: Image.Image) -> Image.Image:
    """Does torchvision's RandomResizedCrop(224, bicubic) and RandomHorizontalFlip on a Pillow image."""
    return random_crop(image, SIZE, _AUGMENT, Image.Resampling.BICUBIC)


def pillow_transform(image: Image.Image) -> torch.Tensor:
    """Does the same and ToTensor, Normalize: torchvision's steps on torchvision's types."""
    return _NORMALISE.image(pillow_crop(image))


def pillow_folder(source: Path, batch: int, workers: int) -> Iterator[Any]:
    """Starts ImageFolder + Pillow + float32 in a DataLoader: the baseline."""
    dataset = Folder(source, pillow_transform)
    permutations = RandomSampler(dataset, num_samples=2**40)  # so that no epoch ends within a measurement
    return iter(DataLoader(dataset, batch, sampler=permutations, num_workers=workers))


def webdataset(shards: Path, batch: int, workers: int) -> Iterator[Any]:
    """Starts webdataset's own pipeline with its shuffle buffer, on the shards of the project."""
    import webdataset as wds

    urls = [str(path) for path in sorted((shards / "train").glob("*.tar"))]
    pipeline = (
        wds.WebDataset(urls, resampled=True)  # without end, each shard drawn anew
        .shuffle(1000, initial=100)
        .decode("pil")
        .to_tuple("jpg;jpeg;png", "cls")
        .map_tuple(pillow_transform, int)
        .batched(batch, partial=False)
    )
    return iter(wds.WebLoader(pipeline, batch_size=None, num_workers=workers))


def timm_folder(source: Path, batch: int, workers: int) -> Iterator[Any]:
    """Starts timm's loader with its defaults and no colour jitter: uint8 to the main process, normalised there."""
    from timm.data import ImageDataset, create_loader

    loader = create_loader(
        ImageDataset(str(source)),
        (3, SIZE, SIZE),
        batch,
        is_training=True,
        interpolation="bicubic",
        color_jitter=None,
        num_workers=workers,
        device=torch.device("cpu"),
        pin_memory=False,
        use_multi_epochs_loader=True,
    )
    return _endless(loader)


def _decoding(dataset: Any) -> Any:
    """Returns the class of streaming data sets whose items are decoded by Pillow and cropped."""

    class Decoding(dataset):
        def __getitem__(self, item: Any) -> tuple[torch.Tensor, int]:
            sample = super().__getitem__(item)
            return pillow_transform(Image.open(io.BytesIO(sample["image"])).convert("RGB")), sample["label"]

    return Decoding


def litdata_stream(folder: Path, batch: int, workers: int) -> Iterator[Any]:
    """Starts litdata's optimized chunks + Pillow + float32."""
    import litdata

    dataset = _decoding(litdata.StreamingDataset)(str(folder), shuffle=True, drop_last=True)
    return _endless(litdata.StreamingDataLoader(dataset, batch_size=batch, num_workers=workers))


def mosaic_stream(folder: Path, batch: int, workers: int) -> Iterator[Any]:
    """Starts mosaicml-streaming's MDS shards + Pillow + float32."""
    import streaming

    streaming.base.util.clean_stale_shared_memory()
    dataset = _decoding(streaming.StreamingDataset)(local=str(folder), shuffle=True, batch_size=batch)
    return _endless(DataLoader(dataset, batch, num_workers=workers, drop_last=True))


def ffcv_loader(folder: Path, batch: int, workers: int) -> Iterator[Any]:
    """Starts FFCV's loader on the machine's page cache: libjpeg-turbo, OpenCV's area resize, uint8, in threads."""
    from ffcv.fields.decoders import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    image = [RandomResizedCropRGBImageDecoder((SIZE, SIZE)), RandomHorizontalFlip(), ToTensor()]
    loader = Loader(
        str(folder / "train.beton"),
        batch,
        num_workers=workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        pipelines={"image": image, "label": [IntDecoder(), ToTensor()]},
    )
    epoch = iter(loader)
    try:
        yield from epoch
    finally:
        epoch.close()


def write_ffcv(source: Path, out: Path, copies: int, image_options: ImageOptions | None = None) -> None:
    """Writes the images as JPEGs of quality 90, which it encodes itself, `copies` times; re-encoded before, or not."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    out.mkdir()
    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}
    images = Decoded(source, copies, image_options)
    DatasetWriter(str(out / "train.beton"), fields, num_workers=1).from_indexed_dataset(images)


class Decoded(Dataset[tuple[np.ndarray, int]]):
    """Files, `copies` times, as pixels (height, width, 3), as FFCV's writer takes them."""

    def __init__(self, source: Path, copies: int, image_options: ImageOptions | None) -> None:
        self.samples, self.image_options = _samples(source) * copies, image_options

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        sample = read_sample(self.samples[number])
        data = transcode(sample["image"], self.image_options)[0] if self.image_options else sample["image"]
        return np.array(Image.open(io.BytesIO(data)).convert("RGB")), sample["label"]


def write_litdata(source: Path, out: Path, copies: int) -> None:
    """Writes the files as they are into litdata's chunks, `copies` times: its readers start anew with every epoch."""
    import litdata

    litdata.optimize(read_sample, _samples(source) * copies, str(out), num_workers=1, chunk_bytes="64MB")


def write_mosaic(source: Path, out: Path, copies: int) -> None:
    """Writes the files as they are into MDS shards, `copies` times."""
    import streaming

    with streaming.MDSWriter(out=str(out), columns={"image": "bytes", "label": "int"}) as writer:
        for sample in _samples(source) * copies:
            writer.write(read_sample(sample))


def read_sample(sample: tuple[str, int]) -> dict[str, Any]:
    """Reads a file: its bytes and its label, as the writers take them."""
    return {"image": Path(sample[0]).read_bytes(), "label": sample[1]}


def _samples(source: Path) -> list[tuple[str, int]]:
    return [(str(path), label) for path, label in class_folders(source)[1]]


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader
