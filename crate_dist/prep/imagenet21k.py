"""ImageNet-21K as it is published, and as it is met when its archives are unpacked; read where it lies.

    fall 2011     fall11_whole.tar, or the folder fall11_whole/ that it unpacks to; 21,841 classes
    winter 2021   winter21_whole.tar, or the folder winter21_whole/; 19,167 classes. It is published as .tar.gz, in
                  which nothing can be found by offset: it must be unpacked once

Each holds one tar per class, n00004475.tar and so on, which may be unpacked to folders of these names, some or all. A
label is the position of the wnid in sorted order, or in a list of classes. A class keeps its label also when there is
no image of it. The same images give the same samples, whichever layout they lie in.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crate_dist.arguments import positive
from crate_dist.data.index import ShardError
from crate_dist.prep.check import Classes
from crate_dist.prep.folders import (
    ListOptions,
    Source,
    Split,
    class_folders,
    contents_of,
    first_few,
    hold_out_each,
    list_images,
    threaded_map,
)
from crate_dist.prep.ilsvrc import WNID, class_tars, list_class_tars
from crate_dist.prep.options import Options
from crate_dist.prep.samples import Samples
from crate_dist.prep.tar import Member
from crate_dist.wording import counted

EDITIONS = {"fall11_whole": 21_841, "winter21_whole": 19_167}
"""The name of an edition's archive, and how many classes are in it."""
_WORDS = ("words.txt", "synset_words.txt")


def is_edition(root: Path) -> bool:
    """Says whether a source is, or has in it, what an edition of ImageNet-21K is published as."""
    endings = ("", ".tar", ".tar.gz")
    names = {f"{edition}{ending}" for edition in EDITIONS for ending in endings}
    try:
        return root.name in names or any((root / name).exists() for name in names)
    except OSError:  # said where the folder is listed
        return False


def add_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Adds the options of ImageNet-21K alone."""
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="wnids to take, one a line, in the order of their labels [all]"
    )
    parser.add_argument(
        "--val-per-class", type=positive, metavar="N",
        help="images of each class held out as val, at most half of its images [no val]",
    )  # fmt: skip


def read_imagenet21k(arguments: argparse.Namespace, options: Options) -> Source:
    """Lists ImageNet-21K as the command line asks for it. Raises ShardError as `imagenet21k` does."""
    classes = Classes.read(arguments.classes) if arguments.classes else None
    return imagenet21k(options.source, options.list_options, classes, arguments.val_per_class or 0, options.seed)


def imagenet21k(
    root: Path, options: ListOptions, classes: Classes | None = None, val_per_class: int = 0, seed: int = 0
) -> Source:
    """Lists ImageNet-21K.

    root: a folder, or the archive itself; classes: those to take, in the order of their labels [all, sorted]
    val_per_class: images of each class that are held out as validation split, of which none is published

    Raises ShardError: no ImageNet-21K here, an archive that is compressed or damaged, a list of other classes.
    """
    found = _Classes.find(root)
    if classes and (odd := [wnid for wnid in classes.ids if not WNID.fullmatch(wnid)]):
        raise ShardError(f"--classes: expected ids like n00004475, one a line, and not {first_few(odd)}")
    ids = list(classes.ids) if classes else sorted(found.all)
    labels = {wnid: label for label, wnid in enumerate(ids)}
    notes = found.notes(ids)
    split, empty = found.list_images(labels, options)
    if empty:
        what = counted(len(empty), "class has", "classes have")
        notes.append(f"{what} no image and keep their labels: {first_few(empty)}")
    splits = {"train": split}
    if val_per_class:
        splits["train"], splits["val"] = hold_out_each(split, val_per_class, seed)
    else:
        notes.append("no validation split is published: --val-per-class 50 would hold out 50 images of every class")
    names = classes.names if classes else found.names(ids)
    return Source(found.folder, found.layout, ids, names, splits, notes)


@dataclass(frozen=True)
class _Classes:
    """The places of the classes. tars: wnid -> a tar, and where the class lies in it if it holds others too

    not_read: lines about what stands there and is no class
    """

    folder: Path
    edition: str | None
    tars: dict[str, tuple[Path, Member | None]]
    folders: Sequence[str]
    not_read: Sequence[str] = ()

    @classmethod
    def find(cls, root: Path) -> _Classes:
        if root.is_file():
            _refuse_compressed(root)
            return cls.of_archive(root, root.parent)
        for folder in (root, *(root / name for name in EDITIONS)):
            if not folder.is_dir():
                continue
            edition = folder.name if folder.name in EDITIONS else None
            tars = {path.stem: (path, None) for path in folder.glob("n*.tar") if WNID.fullmatch(path.stem)}
            named = [name for name in class_folders(folder) if WNID.fullmatch(name)]
            folders = [name for name in named if name not in tars]
            if tars or folders:
                both = first_few(name for name in named if name in tars)
                notes = [f"{folder}: the tar is read, and not the folder that stands beside it: {both}"] if both else ()
                return cls(folder, edition, {**tars}, folders, notes)
            if archive := next((path for name in EDITIONS if (path := folder / f"{name}.tar").is_file()), None):
                return cls.of_archive(archive, folder)
        for name in EDITIONS:
            _refuse_compressed(root / f"{name}.tar.gz")
        raise ShardError(
            f"{root} is not ImageNet-21K: looked for fall11_whole.tar, winter21_whole.tar, and tars or folders of "
            f"classes like n00004475.tar, in it and in {' and '.join(f'{name}/' for name in EDITIONS)}; "
            f"{contents_of(root)}"
        )

    @classmethod
    def of_archive(cls, archive: Path, folder: Path) -> _Classes:
        notes: list[str] = []
        tars = {wnid: (archive, member) for wnid, member in class_tars(archive, notes).items()}
        if not tars:
            raise ShardError(f"{archive} holds no class archives like n00004475.tar")
        return cls(folder, archive.stem if archive.stem in EDITIONS else None, {**tars}, (), notes)

    @property
    def all(self) -> set[str]:
        return {*self.tars, *self.folders}

    @property
    def layout(self) -> str:
        one = any(member for _, member in self.tars.values())
        kinds = ["one archive" if one else "class tars"] * bool(self.tars) + ["class folders"] * bool(self.folders)
        return f"ImageNet-21K{f' of {self.edition}' if self.edition else ''}, {' and '.join(kinds)}"

    def notes(self, ids: Sequence[str]) -> list[str]:
        notes = [*self.not_read]
        expected = [EDITIONS[self.edition]] if self.edition else list(EDITIONS.values())
        if len(self.all) not in expected:
            of = " or ".join(f"{number:,}" for number in expected)
            notes.append(f"{counted(len(self.all), 'class', 'classes')} of {of}: a subset, or not all is unpacked")
        if left := self.all.difference(ids):
            notes.append(f"{counted(len(left), 'class is', 'classes are')} not in --classes and left out")
        return notes

    def list_images(self, labels: dict[str, int], options: ListOptions) -> tuple[Split, list[str]]:
        """Returns (all images by label and name, classes without any)."""

        def one(wnid: str) -> Split:
            found, ignored, unreadable = list_images(self.folder, self.folder / wnid, options)
            return Split(Samples.collect(self.folder, found, labels[wnid]), ignored, unreadable)

        tars = {wnid: place for wnid, place in self.tars.items() if wnid in labels}
        folders = [wnid for wnid in self.folders if wnid in labels]
        listed = dict(zip(tars, list_class_tars(self.folder, tars, labels, options), strict=True))
        listed |= zip(folders, threaded_map(one, folders, "listing class folders", "class"), strict=True)
        filled = [listed[wnid] for wnid in labels if wnid in listed and len(listed[wnid].samples)]
        if not filled:
            raise ShardError(f"no image of any class in {self.folder}")
        return Split.joined(filled), [wnid for wnid in labels if wnid not in listed or not len(listed[wnid].samples)]

    def names(self, ids: Sequence[str]) -> list[str]:
        """Reads what the classes are called, where a file that tells it stands with the images."""
        path = next((path for name in _WORDS if (path := self.folder / name).is_file()), None)
        known = Classes.read(path) if path else Classes([], [])
        names = dict(zip(known.ids, known.names, strict=True))
        return [names.get(wnid, wnid) for wnid in ids]


def _refuse_compressed(path: Path) -> None:
    if path.is_file() and path.name.endswith((".tar.gz", ".tgz")):
        unpack = f"tar -xzf {shlex.quote(str(path))} -C {shlex.quote(str(path.parent))}"
        raise ShardError(
            f"{path} is compressed, and images are read by offset; unpack it once, the class tars in it may stay as "
            f"they are: `{unpack}`, then give --source {shlex.quote(str(path.parent))}"
        )
