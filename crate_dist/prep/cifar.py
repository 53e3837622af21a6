"""CIFAR-10 and CIFAR-100 as their site publishes them, for Python or in binary, packed or unpacked.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; https://www.cs.toronto.edu/~kriz/cifar.html

Images are 3,072 bytes: 1,024 of red, of green and of blue, each 32 rows of 32. They become PNGs, laid end to end in a
file of the working folder, and are then converted as any other images; all editions give the same shards.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crate_dist.data.index import ShardError
from crate_dist.prep.archives import ArchiveFiles, Download, PublishedFile, named_splits
from crate_dist.prep.folders import Source, Split, contents_of
from crate_dist.prep.pickles import PickleError, load_dict
from crate_dist.prep.program import progress_bar
from crate_dist.prep.samples import ImageRef, Samples

SIDE = 32
PIXEL_BYTES = 3 * SIDE * SIDE
_SITE = "https://www.cs.toronto.edu/~kriz/"


@dataclass(frozen=True)
class Edition:
    """One of the four archives.

    train, test: its files of images with their MD5s, where these are known; names_file: of the classes' names
    names_key: of these where that file is a pickle; label: key of the labels, or their column before the pixels
    label_bytes: columns before the pixels
    """

    dataset: str
    num_classes: int
    archive: PublishedFile
    folder: str
    train: Mapping[str, str | None]
    test: Mapping[str, str | None]
    names_file: tuple[str, str | None]
    names_key: str | None
    label: str | int
    label_bytes: int = 0

    def batch(self, files: ArchiveFiles, name: str, md5: str | None) -> Batch:
        """Reads one file of images. Raises ShardError that names it."""
        data = files.read(name, md5)
        try:
            found = _from_pickle(data, self.label) if isinstance(self.label, str) else self._from_records(data)
        except ValueError as error:  # PickleError among them
            raise ShardError(f"{name} in {files.path} cannot be used: {error}") from error
        low, high = int(found.labels.min()), int(found.labels.max())
        if low < 0 or high >= self.num_classes:
            wrong = low if low < 0 else high
            raise ShardError(
                f"{name} in {files.path} has an image of class {wrong}; {self.dataset} has classes 0 to "
                f"{self.num_classes - 1}"
            )
        return found

    def class_names(self, files: ArchiveFiles) -> list[str]:
        """Reads the names of all classes, position = label. Raises ShardError when their number is another."""
        name, md5 = self.names_file
        data = files.read(name, md5)
        try:
            given = load_dict(data).get(self.names_key, ()) if self.names_key else data.split()
            names = [item.decode("ascii") if isinstance(item, bytes) else str(item) for item in given]
        except ValueError as error:
            raise ShardError(f"{name} in {files.path} cannot be used: {error}") from error
        if len(set(names)) != self.num_classes or len(names) != self.num_classes:
            raise ShardError(f"{name} in {files.path} has {len(names)} names of classes, not {self.num_classes}")
        return names

    def _from_records(self, data: bytes) -> Batch:
        assert isinstance(self.label, int)
        length = self.label_bytes + PIXEL_BYTES
        if not data or len(data) % length:
            raise ValueError(f"{len(data):,} bytes are no whole number of records of {length:,} bytes")
        records = np.frombuffer(data, dtype=np.uint8).reshape(-1, length)
        return Batch(records[:, self.label_bytes :], records[:, self.label].astype(np.int64))


class Batch(NamedTuple):
    """The images of one file. pixels: uint8 of shape (images, 3072); labels: int64 of shape (images,)"""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


CIFAR_10 = (
    Edition(
        "CIFAR-10",
        10,
        PublishedFile("cifar-10-python.tar.gz", _SITE, "c58f30108f718f92721af3b95e74349a"),
        "cifar-10-batches-py",
        {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        {"test_batch": "40351d587109b95175f43aff81a1287e"},
        names_file=("batches.meta", "5ff9c542aee3614f3951f8cda6e48888"),
        names_key="label_names",
        label="labels",
    ),
    Edition(
        "CIFAR-10",
        10,
        PublishedFile("cifar-10-binary.tar.gz", _SITE, "c32a1d4ab5d03f1284b67883e8d87530"),
        "cifar-10-batches-bin",
        {f"data_batch_{number}.bin": None for number in range(1, 6)},
        {"test_batch.bin": None},
        names_file=("batches.meta.txt", None),
        names_key=None,
        label=0,
        label_bytes=1,
    ),
)


def cifar_100(coarse: bool) -> tuple[Edition, Edition]:
    """Returns both editions of CIFAR-100, with its 100 classes or, `coarse`, with its 20 superclasses."""
    kind, num_classes = ("coarse", 20) if coarse else ("fine", 100)
    return (
        Edition(
            "CIFAR-100",
            num_classes,
            PublishedFile("cifar-100-python.tar.gz", _SITE, "eb9058c3a382ffc7106e4002c42a8d85"),
            "cifar-100-python",
            {"train": "16019d7e3df5f24257cddd939b257f8d"},
            {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
            names_file=("meta", "7973b15100ade9c7d40fb424638fde48"),
            names_key=f"{kind}_label_names",
            label=f"{kind}_labels",
        ),
        Edition(
            "CIFAR-100",
            num_classes,
            PublishedFile("cifar-100-binary.tar.gz", _SITE, "03b5dce01913d631647c71ecec9e9cb8"),
            "cifar-100-binary",
            {"train.bin": None},
            {"test.bin": None},
            names_file=(f"{kind}_label_names.txt", None),
            names_key=None,
            label=0 if coarse else 1,
            label_bytes=2,
        ),
    )


def cifar(download: Download, dataset: str | None, coarse: bool, val_fraction: float, seed: int) -> Source:
    """Finds CIFAR, `dataset` being "10", "100" or None for the one that is there, and lays its images out as PNGs.

    Raises ShardError: none there, or both and none chosen; an archive or a file in it that cannot be used.
    """
    known = {"10": CIFAR_10, "100": cifar_100(coarse)}
    there = [name for name, editions in known.items() if any(_stands(download, edition) for edition in editions)]
    if dataset is None and len(there) > 1:
        raise ShardError(f"{download.source} holds CIFAR-10 and CIFAR-100; say which one, with --dataset 10 or 100")
    chosen = dataset or (there[0] if there else "10")
    if chosen not in there:
        names = [edition.archive.name for name in ([dataset] if dataset else known) for edition in known[name]]
        raise ShardError(
            f"no CIFAR{'-' + dataset if dataset else ''} in {download.source}: looked for {', '.join(names)} and what "
            f"they unpack to; {contents_of(download.source)}. They are at {_SITE}cifar.html"
        )
    if coarse and chosen == "10":
        raise ShardError("--coarse: CIFAR-10 has no superclasses, CIFAR-100 has")
    edition = next(edition for edition in known[chosen] if _stands(download, edition))
    files = download.files(edition.archive, edition.folder)
    names = edition.class_names(files)
    train = Split(_lay_out(edition, files, "train", edition.train, download.work))
    test = Split(_lay_out(edition, files, "test", edition.test, download.work))
    layout = f"{edition.dataset}, {files.path.name}"
    return Source(download.source, layout, names, names, named_splits(train, test, val_fraction, seed))


def _stands(download: Download, edition: Edition) -> bool:
    return download.find(edition.archive.name) is not None or download.find(edition.folder) is not None


def _lay_out(edition: Edition, files: ArchiveFiles, split: str, given: Mapping[str, str | None], work: Path) -> Samples:
    """Writes all images of a split as PNGs into one file, numbered in the order in which they were published."""
    path = work / f"{split}.pngs"
    found: list[ImageRef] = []
    labels: list[int] = []
    offset = 0
    with path.open("wb") as out, progress_bar(f"{edition.dataset} {split}", 0, " images") as bar:
        for name, md5 in given.items():
            batch = edition.batch(files, name, md5)
            bar.total = len(found) + len(batch.pixels)
            for png in _pngs(batch.pixels):
                found.append(ImageRef(f"{split}-{len(found):05d}.png", out.write(png), offset))
                offset += len(png)
                bar.update()
            labels += batch.labels.tolist()
    return Samples.collect(work, found, labels, path)


def _pngs(pixels: NDArray[np.uint8]) -> Iterator[bytes]:
    for image in pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1):
        out = io.BytesIO()
        Image.fromarray(image).save(out, format="PNG")
        yield out.getvalue()


def _from_pickle(data: bytes, label: str) -> Batch:
    content = load_dict(data)
    if missing := [key for key in ("data", label) if key not in content]:
        raise PickleError(f"there is no {' and no '.join(missing)} in it, but {', '.join(content)}")
    pixels, labels = content["data"], np.asarray(content[label])
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != PIXEL_BYTES or not len(pixels):
        raise PickleError(f"its data is not an array of uint8 with rows of {PIXEL_BYTES:,}")
    if labels.shape != (len(pixels),) or not np.issubdtype(labels.dtype, np.integer):
        raise PickleError(f"it has {len(pixels):,} images and labels of shape {labels.shape} and type {labels.dtype}")
    return Batch(pixels, labels.astype(np.int64))
