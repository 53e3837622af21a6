"""The loaders that benchmarks/data.py compares: each is a function to an iterator of training batches, or missing.

All but ours and FFCV's decode with Pillow and give float32 batches (n, 3, 224, 224), normalised, as torchvision's
reference training does. A package that cannot be imported raises ImportError (torchvision: RuntimeError) here and is a
line "not installed" there.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from crate_dist.config import AugmentSection, ImageSection
from crate_dist.data.index import ShardIndex
from crate_dist.data.loader import Share, TrainLoader
from crate_dist.data.order import Order
from crate_dist.data.transforms import TrainTransform, random_crop
from crate_dist.prep.images import ImageOptions, transcode

SIZE = 224
LANES = 4
_AUGMENT, _IMAGES = AugmentSection(), ImageSection()
_MEAN, _STD = (torch.tensor(values).view(3, 1, 1) for values in (_IMAGES.mean, _IMAGES.std))

Contestant = Callable[[Path, int, int], Iterator[Any]]
"""(what prepare left, batch, workers) -> batches without end"""


def ours(shards: Path, batch: int, workers: int) -> Iterator[Any]:
    """The project's own loader: index, order, DataLoader; uint8 batches, normalised on the device."""
    index = ShardIndex.load(shards / "train")
    order = Order(index.shard_sizes, seed=0, lanes=LANES)
    return TrainLoader(index, order, Share(0, 1, batch, batch), TrainTransform(SIZE), workers)


def pillow_crop(image: Image.Image) -> Image.Image:
    """torchvision's RandomResizedCrop(224, bicubic) and RandomHorizontalFlip on a Pillow image."""
    box = random_crop(image.width, image.height, _AUGMENT.crop_scale, _AUGMENT.crop_ratio, random.Random())
    image = image.crop(box).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image


def pillow_transform(image: Image.Image) -> torch.Tensor:
    """The same and ToTensor, Normalize: torchvision's steps on torchvision's types."""
    pixels = torch.from_numpy(np.array(pillow_crop(image))).permute(2, 0, 1).contiguous()
    return pixels.float().div(255).sub_(_MEAN).div_(_STD)


class FolderDataset(Dataset[tuple[torch.Tensor, int]]):
    """Does as torchvision's ImageFolder: opens a file, decodes it with Pillow, transforms."""

    def __init__(self, root: Path) -> None:
        self.classes = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
        self.files = [
            (path, label) for label, name in enumerate(self.classes) for path in sorted((root / name).iterdir())
        ]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        path, label = self.files[number % len(self.files)]
        with path.open("rb") as file:
            return pillow_transform(Image.open(file).convert("RGB")), label


class _Shuffled:
    """Sampler: one permutation after another, so that no epoch ends within a measurement."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self.count).tolist()


def pillow_folder(source: Path, batch: int, workers: int) -> Iterator[Any]:
    """ImageFolder + Pillow + float32 in a DataLoader: the baseline."""
    dataset = FolderDataset(source)
    return iter(DataLoader(dataset, batch, sampler=_Shuffled(len(dataset)), num_workers=workers))


def webdataset(shards: Path, batch: int, workers: int) -> Iterator[Any]:
    """webdataset's own pipeline with its shuffle buffer, on the shards of the project."""
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
    """timm's loader with its defaults and no colour jitter: uint8 to the main process, normalised there."""
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


def litdata_stream(folder: Path, batch: int, workers: int) -> Iterator[Any]:
    """litdata's optimized chunks + Pillow + float32."""
    import litdata

    class Decoded(litdata.StreamingDataset):
        def __getitem__(self, item: Any) -> tuple[torch.Tensor, int]:
            sample = super().__getitem__(item)
            return pillow_transform(Image.open(io.BytesIO(sample["image"])).convert("RGB")), sample["label"]

    dataset = Decoded(str(folder), shuffle=True, drop_last=True)
    return _endless(litdata.StreamingDataLoader(dataset, batch_size=batch, num_workers=workers))


def mosaic_stream(folder: Path, batch: int, workers: int) -> Iterator[Any]:
    """mosaicml-streaming's MDS shards + Pillow + float32."""
    import streaming

    class Decoded(streaming.StreamingDataset):
        def __getitem__(self, item: Any) -> tuple[torch.Tensor, int]:
            sample = super().__getitem__(item)
            return pillow_transform(Image.open(io.BytesIO(sample["image"])).convert("RGB")), sample["label"]

    streaming.base.util.clean_stale_shared_memory()
    dataset = Decoded(local=str(folder), shuffle=True, batch_size=batch)
    return _endless(DataLoader(dataset, batch, num_workers=workers, drop_last=True))


def ffcv_loader(folder: Path, batch: int, workers: int) -> Iterator[Any]:
    """FFCV's loader on the machine's page cache: libjpeg-turbo, OpenCV's area resize, uint8; `workers` threads."""
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


def write_ffcv(source: Path, out: Path, copies: int, workers: int, image_options: ImageOptions | None = None) -> None:
    """The images as JPEGs of quality 90, which it encodes itself, `copies` times; treated by ours before, or not."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    out.mkdir()
    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}
    DatasetWriter(str(out / "train.beton"), fields, num_workers=workers).from_indexed_dataset(
        Decoded(FolderDataset(source).files * copies, image_options)
    )


class Decoded(Dataset[tuple[np.ndarray, int]]):
    """Files as pixels (height, width, 3), as FFCV's writer takes them."""

    def __init__(self, files: list[tuple[Path, int]], image_options: ImageOptions | None) -> None:
        self.files, self.image_options = files, image_options

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        path, label = self.files[number]
        data = path.read_bytes()
        if self.image_options:
            data = transcode(data, self.image_options)[0]
        return np.array(Image.open(io.BytesIO(data)).convert("RGB")), label


def write_litdata(source: Path, out: Path, copies: int, workers: int) -> None:
    """The files as they are into litdata's chunks, `copies` times: its readers end and start anew with every epoch."""
    import litdata

    files = FolderDataset(source).files * copies
    inputs = [(str(path), label) for path, label in files]
    litdata.optimize(litdata_sample, inputs, str(out), num_workers=workers, chunk_bytes="64MB")


def litdata_sample(entry: tuple[str, int]) -> dict[str, Any]:
    """One sample for litdata's writer."""
    return {"image": Path(entry[0]).read_bytes(), "label": entry[1]}


def write_mosaic(source: Path, out: Path, copies: int) -> None:
    """The files as they are into MDS shards, `copies` times."""
    import streaming

    with streaming.MDSWriter(out=str(out), columns={"image": "bytes", "label": "int"}) as writer:
        for path, label in FolderDataset(source).files * copies:
            writer.write({"image": path.read_bytes(), "label": label})


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader
