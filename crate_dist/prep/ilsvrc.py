"""ImageNet (ILSVRC2012) in the layouts that it is met in, read where it lies.

    class folders     train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, or the <wnid> folders alone
    Kaggle            ILSVRC/Data/CLS-LOC/{train/<wnid>,val}, with LOC_val_solution.csv and LOC_synset_mapping.txt
    original          ILSVRC2012_img_train.tar (a tar of one tar per class), ILSVRC2012_img_val.tar,
                      ILSVRC2012_devkit_t12.tar.gz; read by offset, never unpacked to disk

Parts of different layouts may stand together, as when only the training images were unpacked. A label is the position
of the wnid in sorted order, as in torchvision. The same images give the same samples, whichever layout they lie in.
"""

from __future__ import annotations

import csv
import io
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crate_dist.data.index import ShardError
from crate_dist.prep.folders import (
    ListOptions,
    Source,
    Split,
    class_folders,
    contents_of,
    first_few,
    list_classes,
    list_images,
    threaded_map,
)
from crate_dist.prep.samples import ImageRef, Samples, list_archive
from crate_dist.prep.tar import Member, walk_tar

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
SOLUTION = "LOC_val_solution.csv"
NUM_CLASSES = 1000
_NAME_FILES = ("LOC_synset_mapping.txt", "synset_words.txt")
WNID = re.compile(r"n[0-9]{8}")
"""The id of a class, of WordNet."""
_VAL_NUMBER = re.compile(r"_([0-9]{8})$")
_MAX_DEVKIT_FILE = 64 * 2**20


def imagenet(root: Path, splits: Sequence[str] | None, options: ListOptions) -> Source:
    """Finds ImageNet in a folder and lists the splits asked for (None: those that are there).

    Raises ShardError: no ImageNet here, a split that is missing, validation images without a list of their classes,
    validation classes that are not among the training classes.
    """
    parts = _Parts.find(root)
    if not parts.found:
        raise ShardError(
            f"{root} is not ImageNet: looked for class folders named like n01440764 in it, in train/ and in "
            f"ILSVRC/Data/CLS-LOC/train/, and for {TRAIN_TAR}; {contents_of(root)}. "
            f"For any tree of class folders: python data_prep/image_folder.py --source {root} --out DIR; "
            "for ImageNet-21K: data_prep/imagenet21k.py"
        )
    if missing := [name for name in splits or () if name not in parts.found]:
        raise ShardError(f"no {' and no '.join(missing)} images in {root}; there are: {', '.join(parts.found)}")
    wanted = splits or parts.found
    truth = parts.truth() if "val" in wanted and parts.val is not None and not parts.val_folders else {}
    classes = parts.train_classes or parts.val_folders or sorted(set(truth.values()))
    labels = {wnid: label for label, wnid in enumerate(classes)}
    notes = list(parts.notes)
    if len(classes) > NUM_CLASSES:
        notes.append(f"{len(classes)} classes; data_prep/imagenet21k.py knows the layouts of ImageNet-21K")
    elif len(classes) < NUM_CLASSES:
        notes.append(f"{len(classes)} of ImageNet's {NUM_CLASSES} classes: a subset, labels are numbered within it")
    if splits is None and (absent := {"train", "val"} - set(parts.found)):
        notes.append(f"no {absent.pop()} images in {root}")
    listed = {}
    for name in wanted:
        listed[name] = parts.list_train(labels, options) if name == "train" else parts.list_val(labels, truth, options)
    names = parts.class_names()
    return Source(root, parts.layout, classes, [names.get(wnid, wnid) for wnid in classes], listed, notes)


@dataclass(frozen=True)
class _Parts:
    """The parts of ImageNet that a folder holds. base: the folder that train/ and val/ stand in."""

    root: Path
    base: Path
    train: Path | None
    val: Path | None
    train_classes: Sequence[str]
    train_tars: Mapping[str, Member]
    val_folders: Sequence[str]
    notes: Sequence[str]

    @classmethod
    def find(cls, root: Path) -> _Parts:
        if not root.is_dir():
            raise ShardError(f"no folder {root}; --source takes the folder that holds ImageNet")
        class_folders(root)  # says so where it cannot be read
        bases = [root / sub for sub in ("", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")]
        base = next((b for b in bases if (b / "train").is_dir() or (b / "val").is_dir()), root)
        notes: list[str] = []
        train: Path | None = base / "train" if (base / "train").is_dir() else base
        assert train is not None
        classes = _wnids(train, notes)
        tars: dict[str, Member] = {}
        if not classes and (root / TRAIN_TAR).is_file():
            train = root / TRAIN_TAR
            tars = class_tars(train, notes)
            classes = sorted(tars)
            if not classes:
                raise ShardError(f"{train} holds no class archives like n01440764.tar")
        val, val_folders = None, []
        if (base / "val").is_dir():
            val_folders = _wnids(base / "val", notes)
            flat = not val_folders and any(p.suffix == ".JPEG" for p in (base / "val").iterdir())
            val = base / "val" if val_folders or flat else None
        if val is None and (root / VAL_TAR).is_file():
            val = root / VAL_TAR
        return cls(root, base, train if classes else None, val, classes, tars, val_folders, notes)

    @property
    def found(self) -> list[str]:
        return [name for name, path in (("train", self.train), ("val", self.val)) if path is not None]

    @property
    def layout(self) -> str:
        kinds = {self._kind(path) for path in (self.train, self.val) if path is not None}
        return "ILSVRC2012, " + " and ".join(sorted(kinds))

    def _kind(self, path: Path) -> str:
        if path.is_file():
            return "original archives"
        return "CLS-LOC folders" if self.base.name == "CLS-LOC" else "class folders"

    def list_train(self, labels: Mapping[str, int], options: ListOptions) -> Split:
        assert self.train is not None
        if not self.train_tars:
            return list_classes(self.root, self.train, self.train_classes, labels, options)
        archive = self.train
        places = {wnid: (archive, self.train_tars[wnid]) for wnid in self.train_classes}
        listed = list_class_tars(self.root, places, labels, options)
        if empty := [wnid for wnid, part in zip(self.train_classes, listed, strict=True) if not len(part.samples)]:
            raise ShardError(f"{archive}: no image in {first_few(f'{wnid}.tar' for wnid in empty)}")
        return Split.joined(listed)

    def list_val(self, labels: Mapping[str, int], truth: Mapping[str, str], options: ListOptions) -> Split:
        assert self.val is not None
        if self.val_folders:
            self._check_known(self.val_folders, labels)
            return list_classes(self.root, self.val, self.val_folders, labels, options)
        archive = self.val if self.val.is_file() else None
        if archive:
            found, ignored, unreadable = list_archive(archive, skip_bad=options.skip_bad)
        else:
            found, ignored, unreadable = list_images(self.root, self.val, options)
        by_wnid: dict[str, list[ImageRef]] = {}
        for image in found:
            stem = Path(image.name).stem
            number = _VAL_NUMBER.search(stem)
            wnid = truth.get(stem) or (truth.get(number[1]) if number else None)
            if wnid is None:
                raise ShardError(f"{self.val}: no class is given for {image.name}")
            by_wnid.setdefault(wnid, []).append(image)
        if not by_wnid:
            raise ShardError(f"no images in {self.val}")
        self._check_known(by_wnid, labels)
        listed = [Samples.collect(self.root, by_wnid[wnid], labels[wnid], archive) for wnid in sorted(by_wnid)]
        return Split(Samples.concatenate(listed), ignored, unreadable)

    def _check_known(self, wnids: Iterable[str], labels: Mapping[str, int]) -> None:
        if unknown := [wnid for wnid in wnids if wnid not in labels]:
            raise ShardError(
                f"{len(unknown)} classes of the images in {self.val} are not among the {len(labels)} training classes "
                f"({first_few(unknown)}); labels are numbered by the training classes, so these must hold all of them"
            )

    def truth(self) -> Mapping[str, str]:
        """Reads validation image -> wnid, by its stem (from the CSV) or its number's eight digits (from the devkit)."""
        if path := self._beside(SOLUTION):
            return _read_solution(path)
        if devkit := self._devkit():
            return devkit.truth
        raise ShardError(
            f"{self.val} does not say which class its images are of; put {DEVKIT}.tar.gz (original ImageNet) or "
            f"{SOLUTION} (Kaggle) into {self.root}, or sort the images into class folders, "
            "or leave them out with --splits train"
        )

    def class_names(self) -> Mapping[str, str]:
        """Reads wnid -> words, as far as a file that tells them stands with the images."""
        for name in _NAME_FILES:
            if path := self._beside(name):
                lines = (line.partition(" ") for line in path.read_text(encoding="utf-8").splitlines())
                return {wnid: words.strip() for wnid, _, words in lines if WNID.fullmatch(wnid)}
        devkit = self._devkit()
        return devkit.words if devkit else {}

    def _devkit(self) -> _Devkit | None:
        path = self._beside(f"{DEVKIT}.tar.gz") or self._beside(DEVKIT)
        return _Devkit.read(path) if path else None

    def _beside(self, name: str) -> Path | None:
        places = [self.root, self.base]
        if self.base.name == "CLS-LOC":  # the files stand beside ILSVRC/, which may itself be the source
            places += [self.base.absolute().parents[n] for n in range(3)]
        return next((place / name for place in places if (place / name).exists()), None)


@dataclass(frozen=True)
class _Devkit:
    truth: Mapping[str, str]
    words: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> _Devkit:
        """Reads the archive, which stays packed, or from the folder that it was unpacked to. Raises ShardError."""
        from scipy.io import loadmat

        meta, truth = (_devkit_file(path, n) for n in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"))
        try:
            synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
            leaves = synsets[synsets["num_children"].astype(int) == 0]
            wnids = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in leaves}
            words = {str(s["WNID"]): str(s["words"]) for s in leaves}
            numbers = [int(line) for line in truth.split()]
            by_number = {f"{position:08d}": wnids[number] for position, number in enumerate(numbers, start=1)}
        except Exception as error:  # loadmat raises whatever the bytes make it trip over
            raise ShardError(f"{path} is not the devkit of ILSVRC2012: {type(error).__name__}: {error}") from error
        return cls(by_number, words)


def class_tars(archive: Path, notes: list[str]) -> dict[str, Member]:
    """Finds the tars of classes, called like n01440764.tar, in a tar. notes: is told which members are none

    Raises ShardError: a class that comes twice, or whose tar is a link or no file.
    """
    found: dict[str, Member] = {}
    others = []
    for member in walk_tar(archive):
        path = Path(member.name)
        if path.suffix != ".tar" or not WNID.fullmatch(path.stem):
            others.append(member.name)
        elif path.stem in found:
            raise ShardError(f"{archive} holds {path.name} twice: {found[path.stem].name} and {member.name}")
        elif member.problem:
            raise ShardError(f"{archive}: {member.name} is {member.problem}; unpack the archive")
        else:
            found[path.stem] = member
    if found and others:
        notes.append(f"{archive}: no tars of classes, not read: {first_few(others)}")
    return found


def list_class_tars(
    root: Path, places: Mapping[str, tuple[Path, Member | None]], labels: Mapping[str, int], options: ListOptions
) -> list[Split]:
    """Lists the images of each class by name. places: class -> its tar, or a tar that it lies in and where

    Raises ShardError: as list_archive.
    """

    def one(wnid: str) -> Split:
        path, member = places[wnid]
        start, size = (member.offset, member.size) if member else (0, None)
        found, ignored, unreadable = list_archive(path, start, size, options.skip_bad)
        return Split(Samples.collect(root, found, labels[wnid], path), ignored, unreadable)

    return list(threaded_map(one, list(places), "listing class tars", "class"))


def _devkit_file(path: Path, name: str) -> bytes:
    try:
        if path.is_dir():
            return (path / "data" / name).read_bytes()
        with tarfile.open(path, "r:gz") as archive:
            for info in archive:
                if info.isreg() and info.name.endswith(f"data/{name}") and info.size <= _MAX_DEVKIT_FILE:
                    file = archive.extractfile(info)
                    assert file is not None
                    return file.read()
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ShardError(f"cannot read {path}: {error}") from error
    raise ShardError(f"{path} has no data/{name}: expected the devkit of ILSVRC2012 for tasks 1 and 2")


def _read_solution(path: Path) -> dict[str, str]:
    truth = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if not row or row[0] == "ImageId":
                continue
            wnid = row[1].split(" ", 1)[0] if len(row) > 1 else ""
            if not WNID.fullmatch(wnid):
                raise ShardError(f"{path}, line {number}: expected an image, a comma and a wnid, not {','.join(row)!r}")
            truth[row[0]] = wnid
    return truth


def _wnids(folder: Path, notes: list[str]) -> list[str]:
    names = class_folders(folder)
    wnids = [name for name in names if WNID.fullmatch(name)]
    if wnids and (others := [name for name in names if name not in {*wnids, "train", "val", "test"}]):
        notes.append(f"{folder}: not named like a class, not read: {first_few(others)}")
    return wnids
