"""The Oxford-IIIT Pet data set as its site publishes it, packed or unpacked.

Parkhi, Vedaldi, Zisserman and Jawahar, "Cats and dogs", 2012; https://www.robots.ox.ac.uk/~vgg/data/pets/

annotations/trainval.txt and test.txt have a line per image: its name, its class from 1 on, and two numbers more. A
class is called as its images are, without their number. Among the images lie others and .mat files, which are passed
over and counted.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from crate_dist.data.index import ShardError
from crate_dist.prep.archives import ArchiveFiles, Download, PublishedFile, named_splits
from crate_dist.prep.folders import ListOptions, Source, Split, first_few

_SITE = "https://www.robots.ox.ac.uk/~vgg/data/pets/data/"
IMAGES = PublishedFile("images.tar.gz", _SITE, "5c4f3ee8e5d25df40f4fd59a7f44e54c")
ANNOTATIONS = PublishedFile("annotations.tar.gz", _SITE, "95a8c909bbe2e81eed6a22bccdf3f68f")
_NAME = re.compile(r"([A-Za-z_]+)_[0-9]+")


class _Line(NamedTuple):
    image: str
    label: int


def pets(download: Download, options: ListOptions, val_fraction: float, seed: int) -> Source:
    """Finds the data set and lists trainval.txt as train and test.txt as val, or as named_splits says.

    Raises ShardError: something is missing, damaged or not what was published, or the parts do not fit each other.
    """
    files, annotations = download.files(IMAGES, "images"), download.files(ANNOTATIONS, "annotations")
    lists = {name: _read_list(annotations, name) for name in ("trainval.txt", "test.txt")}
    everything = [line for lines in lists.values() for line in lines]
    if twice := [image for image, times in Counter(line.image for line in everything).items() if times > 1]:
        raise ShardError(f"{annotations.path}: more than once in {' and '.join(lists)}: {first_few(twice)}")
    classes = _class_names(everything, annotations)
    images, ignored, unreadable = files.images(options)
    train, test = (
        files.samples(images, [line.image for line in lines], [line.label for line in lines], name)
        for name, lines in lists.items()
    )
    splits = named_splits(Split(train, ignored, unreadable), Split(test), val_fraction, seed)
    words = [" ".join(word.capitalize() for word in name.split("_")) for name in classes]
    return Source(download.source, f"Oxford-IIIT Pet, {files.path.name}", classes, words, splits)


def _read_list(annotations: ArchiveFiles, name: str) -> list[_Line]:
    lines = []
    text = annotations.read(name).decode("utf-8", "replace")
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split()
        if not fields or line.startswith("#"):
            continue
        if len(fields) < 2 or not _NAME.fullmatch(fields[0]) or not fields[1].isdecimal() or int(fields[1]) < 1:
            raise ShardError(
                f"{name} in {annotations.path}, line {number}: expected an image and its class like "
                f"'Abyssinian_100 1 1 1', not {line[:80]!r}"
            )
        lines.append(_Line(fields[0], int(fields[1]) - 1))
    if not lines:
        raise ShardError(f"{name} in {annotations.path} lists no images")
    return sorted(lines)


def _class_names(lines: list[_Line], annotations: ArchiveFiles) -> list[str]:
    """Returns the name of each class, position = label. Raises ShardError where numbers and names contradict."""
    names: dict[int, str] = {}
    for line in lines:
        name = line.image.rpartition("_")[0]
        if names.setdefault(line.label, name) != name:
            raise ShardError(f"{annotations.path}: class {line.label + 1} is {names[line.label]} and {name} in it")
    if sorted(names) != list(range(len(names))) or len(set(names.values())) != len(names):
        raise ShardError(
            f"{annotations.path}: its classes {first_few(f'{n + 1} {name}' for n, name in sorted(names.items()))} "
            "are not numbered from 1 on, each once"
        )
    return [names[label] for label in range(len(names))]
