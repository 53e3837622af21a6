"""Oxford Flowers 102 as its site publishes it, packed or unpacked.

Nilsback and Zisserman, "Automated flower classification over a large number of classes", 2008;
https://www.robots.ox.ac.uk/~vgg/data/flowers/102/

The images are numbered; imagelabels.mat has the class of each, from 1 on, and setid.mat the numbers in each split.
"""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np

from crate_dist.data.index import ShardError
from crate_dist.data.order import Int64
from crate_dist.prep.archives import ArchiveFiles, Download, PublishedFile
from crate_dist.prep.folders import ListOptions, Source, Split, first_few
from crate_dist.prep.samples import ImageRef, Samples

_SITE = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
IMAGES = PublishedFile("102flowers.tgz", _SITE, "52808999861908f626f3c1f4e79d11fa")
LABELS = PublishedFile("imagelabels.mat", _SITE, "e0620be6f572b9609742df49c70aed4d")
SPLITS = PublishedFile("setid.mat", _SITE, "a5357ecc9cb78c4bef273ce3793fc85c")
_FOLDER = "jpg"
_KEYS = {"train": "trnid", "val": "valid", "test": "tstid"}

CLASS_NAMES = tuple(
    """
pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold, tiger lily, moon orchid,
bird of paradise, monkshood, globe thistle, snapdragon, colt's foot, king protea, spear thistle, yellow iris,
globe-flower, purple coneflower, peruvian lily, balloon flower, giant white arum lily, fire lily, pincushion flower,
fritillary, red ginger, grape hyacinth, corn poppy, prince of wales feathers, stemless gentian, artichoke, sweet
william, carnation, garden phlox, love in the mist, mexican aster, alpine sea holly, ruby-lipped cattleya, cape
flower, great masterwort, siam tulip, lenten rose, barberton daisy, daffodil, sword lily, poinsettia, bolero deep
blue, wallflower, marigold, buttercup, oxeye daisy, common dandelion, petunia, wild pansy, primula, sunflower,
pelargonium, bishop of llandaff, gaura, geranium, orange dahlia, pink-yellow dahlia, cautleya spicata, japanese
anemone, black-eyed susan, silverbush, californian poppy, osteospermum, spring crocus, bearded iris, windflower,
tree poppy, gazania, azalea, water lily, rose, thorn apple, morning glory, passion flower, lotus, toad lily,
anthurium, frangipani, clematis, hibiscus, columbine, desert-rose, tree mallow, magnolia, cyclamen, watercress,
canna lily, hippeastrum, bee balm, ball moss, foxglove, bougainvillea, camellia, mallow, mexican petunia, bromelia,
blanket flower, trumpet creeper, blackberry lily
""".replace("\n", " ")
    .strip()
    .split(", ")
)
"""In the order of the labels; the files themselves have numbers only."""


def flowers(download: Download, options: ListOptions, join_val: bool) -> Source:
    """Finds the data set and lists its splits train, val and test; with `join_val`, train and val in one, and test.

    Raises ShardError: something is missing, damaged or not what was published, or the parts do not fit each other.
    """
    files = download.files(IMAGES, _FOLDER)
    labels = _integers(download.file(LABELS), "labels", LABELS.name)
    if labels.min() < 1 or labels.max() > len(CLASS_NAMES):
        wrong = int(labels.min() if labels.min() < 1 else labels.max())
        raise ShardError(f"{LABELS.name} has an image of class {wrong}; the classes are 1 to {len(CLASS_NAMES)}")
    setid = download.file(SPLITS)
    ids = {split: _integers(setid, key, SPLITS.name) for split, key in _KEYS.items()}
    _check_apart(ids)
    images, ignored, unreadable = files.images(options)
    listed = {split: Split(_samples(files, images, labels, numbers)) for split, numbers in ids.items()}
    if join_val:  # the test images stand in for validation, as they do where nothing else is
        listed = {"train": Split.joined([listed["train"], listed["val"]]), "val": listed["test"]}
    listed["train"] = Split(listed["train"].samples, ignored, unreadable)
    classes = [f"{number:03d}" for number in range(1, len(CLASS_NAMES) + 1)]
    return Source(download.source, f"Flowers 102, {files.path.name}", classes, CLASS_NAMES, listed)


def _integers(mat: bytes, key: str, name: str) -> Int64:
    from scipy.io import loadmat

    try:
        values = np.asarray(loadmat(io.BytesIO(mat), variable_names=[key])[key]).ravel()
        if not np.issubdtype(values.dtype, np.integer) or not len(values):
            raise ValueError(f"{key} holds no whole numbers but {values.dtype}")
        return values.astype(np.int64)
    except Exception as error:  # loadmat raises whatever the bytes make it trip over
        raise ShardError(f"{name} is not the one of Flowers 102: {type(error).__name__}: {error}") from error


def _check_apart(ids: dict[str, Int64]) -> None:
    numbers, counts = np.unique(np.concatenate(list(ids.values())), return_counts=True)
    if (counts > 1).any():
        twice = first_few(f"image_{number:05d}" for number in numbers[counts > 1])
        raise ShardError(f"{SPLITS.name}: more than once in the splits: {twice}")


def _samples(files: ArchiveFiles, images: Mapping[str, ImageRef], labels: Int64, numbers: Int64) -> Samples:
    numbers = np.sort(numbers)
    if numbers[-1] > len(labels) or numbers[0] < 1:
        raise ShardError(
            f"{SPLITS.name} names image {numbers[-1]}, and {LABELS.name} has the classes of {len(labels):,}: "
            "they do not belong together"
        )
    stems = [f"image_{number:05d}" for number in numbers]
    return files.samples(images, stems, (labels[numbers - 1] - 1).tolist(), SPLITS.name)
