"""Data sets as their sites publish them: compressed archives in one folder, or the folders that they unpack to.

A compressed archive cannot be read by offset. It is checked against its published digest, decompressed as a stream
to a plain tar in a working folder, and read from there as ImageNet's archives are: no name in an archive ever becomes
a path on disk. The working folder goes when the conversion ends.
"""

from __future__ import annotations

import argparse
import fcntl
import gzip
import hashlib
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from crate_dist.data.index import ShardError
from crate_dist.prep.folders import ListOptions, Split, contents_of, first_few, hold_out, list_images
from crate_dist.prep.program import explained
from crate_dist.prep.samples import ImageRef, Samples, is_image_name
from crate_dist.prep.tar import MAX_IMAGE_BYTES, Member, walk_tar
from crate_dist.wording import size

_WORK = ".unpacked"
_TORCHVISION = ("flowers-102", "oxford-iiit-pet")  # folders that it downloads into
_MAX_UNPACKED = 16 * 2**30
_BLOCK = 4 * 2**20
_ROOM = "the archive is decompressed there for the time of the conversion and needs some room"


@dataclass(frozen=True)
class PublishedFile:
    """A file that a site publishes in a folder. md5: of the whole file; torchvision lists the same."""

    name: str
    site: str
    md5: str

    @property
    def url(self) -> str:
        """The address of the file."""
        return f"{self.site}{self.name}"


@dataclass(frozen=True)
class Download:
    """A data set as it was downloaded.

    source: what --source says, the folder of its files or one of them itself; work: where archives are decompressed
    any_digest: take files that are not what their site publishes
    """

    source: Path
    work: Path
    any_digest: bool

    def find(self, name: str) -> Path | None:
        """Returns the file or folder of this name, None where there is none."""
        if self.source.name == name:
            return self.source
        places = (self.source / sub / name for sub in ("", *_TORCHVISION))
        return next((place for place in places if place.exists()), None)

    def file(self, published: PublishedFile) -> bytes:
        """Reads a small file, whole. Raises ShardError when it is not there or not what was published."""
        path = self.find(published.name)
        if path is None:
            raise self._missing(published)
        self.check(path, published)
        return path.read_bytes()

    def files(self, published: PublishedFile, folder: str) -> ArchiveFiles:
        """Returns the files that an archive holds in `folder`, or that folder itself where it stands unpacked.

        Raises ShardError when neither is there, or the archive is not what was published, cut off, or damaged.
        """
        path = self.find(published.name)
        if path is not None:
            self.check(path, published)
            tar = self._decompress(path, published)
            return ArchiveFiles(path, self.source, tar, _members(tar, path, folder), trusted=True)
        path = self.find(folder)
        if path is None:
            raise self._missing(published, f" and for the folder {folder}/ that it unpacks to")
        return ArchiveFiles(path, self.source, None, {}, trusted=self.any_digest)

    def check(self, path: Path, published: PublishedFile) -> None:
        """Raises ShardError when a file has not its published digest, unless any is to be taken."""
        if self.any_digest:
            return
        with path.open("rb") as file:
            md5 = hashlib.file_digest(file, "md5").hexdigest()
        if md5 != published.md5:
            raise ShardError(
                f"{path} ({path.stat().st_size:,} bytes) has the MD5 {md5} and as published has {published.md5}: it "
                f"was cut short on its way, or is another version; get it anew from {published.url}, or take it as "
                "it is with --any-digest"
            )

    def _missing(self, published: PublishedFile, more: str = "") -> ShardError:
        return ShardError(
            f"{published.name} is missing in {self.source}: looked for {published.name}{more}; "
            f"{contents_of(self.source)}; get it from {published.url}"
        )

    def _decompress(self, path: Path, published: PublishedFile) -> Path:
        target = self.work / f"{path.name}.tar"
        unpacked = 0
        try:
            with gzip.open(path, "rb") as packed, target.open("wb") as plain:
                while block := packed.read(_BLOCK):
                    unpacked += len(block)
                    if unpacked > _MAX_UNPACKED:
                        raise ShardError(f"{path} unpacks to more than {size(_MAX_UNPACKED)}: refused as a bomb")
                    with explained(f"cannot write {target}", _ROOM):
                        plain.write(block)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            what = "is cut off" if isinstance(error, EOFError) else "is no gzip archive, or a damaged one"
            raise ShardError(
                f"{path} {what}, after {size(unpacked)} unpacked ({error}); get it anew from {published.url}"
            ) from error
        except OSError as error:
            raise ShardError(f"cannot read {path}: {error.strerror or error}") from error
        return target


@dataclass(frozen=True)
class ArchiveFiles:
    """The files of an archive, or of the folder that it was unpacked to.

    path: the archive or the folder, for people; root: what names of images start from, in a folder
    tar: the decompressed archive, or None; members: of it, by their name below the data set's folder
    trusted: digests of single files are not looked at
    """

    path: Path
    root: Path
    tar: Path | None
    members: Mapping[str, Member]
    trusted: bool

    def read(self, name: str, md5: str | None = None) -> bytes:
        """Reads one file, whole. md5: as published. Raises ShardError when it is missing, too large or another one."""
        try:
            if self.tar is None:
                data = self._read_unpacked(self.path / name)
            else:
                member = self.members[name]
                self._check_size(name, member.size)
                with self.tar.open("rb") as file:
                    data = os.pread(file.fileno(), member.size, member.offset)
        except (KeyError, FileNotFoundError):
            raise ShardError(f"{self.path} has no file {name}: it is incomplete, or another data set") from None
        except OSError as error:
            raise ShardError(f"cannot read {name} in {self.path}: {error.strerror or error}") from error
        if md5 and not self.trusted and (found := hashlib.md5(data, usedforsecurity=False).hexdigest()) != md5:
            raise ShardError(
                f"{self.path / name} has the MD5 {found} and as published has {md5}; unpack the archive anew, or "
                "take the file as it is with --any-digest"
            )
        return data

    def images(self, options: ListOptions) -> tuple[dict[str, ImageRef], int, list[str]]:
        """Returns (images by the stem of their names, number of other files, names of unreadable images)."""
        if self.tar is None:
            found, others, unreadable = list_images(self.root, self.path, options)
        else:
            images = [member for name, member in self.members.items() if is_image_name(name)]
            found = [ImageRef(image.name, image.size, image.offset) for image in images]
            others, unreadable = len(self.members) - len(images), []
        by_stem = {Path(image.name).stem: image for image in found}
        if len(by_stem) < len(found):
            names = {image.name for image in found} - {image.name for image in by_stem.values()}
            raise ShardError(f"{self.path} has several images that are called {Path(min(names)).stem}")
        return by_stem, others, unreadable

    def samples(
        self, images: Mapping[str, ImageRef], stems: Sequence[str], labels: Sequence[int], named_by: str
    ) -> Samples:
        """Returns the images of these stems, with their labels. Raises ShardError for one that is not there.

        named_by: the list that the stems are from, for the message
        """
        if missing := [f"{stem}.jpg" for stem in stems if stem not in images]:
            raise ShardError(
                f"{self.path} has no {first_few(missing)}, which {named_by} names: it is incomplete, or another data "
                "set"
            )
        return Samples.collect(self.root, [images[stem] for stem in stems], labels, self.tar)

    def _read_unpacked(self, path: Path) -> bytes:
        if not path.is_file():  # to open a pipe would block
            raise FileNotFoundError(path)
        self._check_size(path.name, path.stat().st_size)
        return path.read_bytes()

    def _check_size(self, name: str, size: int) -> None:
        if size > MAX_IMAGE_BYTES:
            raise ShardError(f"{name} in {self.path} has {size:,} bytes, far more than it may have")


def add_any_digest(parser: argparse.ArgumentParser) -> None:
    """Adds --any-digest, the field of Download."""
    parser.add_argument("--any-digest", action="store_true", help="take files that are not as they were published")


def named_splits(train: Split, test: Split, val_fraction: float, seed: int) -> dict[str, Split]:
    """Returns the training images, and the test images as `val`, or as `test` where some are held out as `val`."""
    if not val_fraction:
        return {"train": train, "val": test}
    rest, held = hold_out(train, val_fraction, seed)
    return {"train": rest, "val": held, "test": test}


@contextmanager
def download_workspace(out: Path, dry_run: bool) -> Iterator[Path]:
    """Makes a folder for what is decompressed: hidden in `out`, or a temporary one when nothing is to be written there.

    What a dead conversion left in it is removed; it goes, with folders that were made for it, when the block ends.
    Raises ShardError when another conversion is at work, or the folder cannot be made.
    """
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="crate-dist-") as folder:
            yield Path(folder)
        return
    made = [parent for parent in (out, *out.parents) if not parent.exists()]
    work = out / _WORK
    with explained(f"cannot write to {out}"):
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        with suppress(OSError):  # not every network file system can lock
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ShardError(f"another conversion is writing to {out}; wait for it, or end it") from None
        for left in work.iterdir():
            left.unlink()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
            for parent in made:
                with suppress(OSError):  # the shards are in it
                    parent.rmdir()
    finally:
        os.close(lock)


def _members(tar: Path, archive: Path, folder: str) -> dict[str, Member]:
    members: dict[str, Member] = {}
    try:
        for member in walk_tar(tar):
            name = member.name.removeprefix("./")
            if member.problem or not name.startswith(f"{folder}/"):
                continue
            name = name.removeprefix(f"{folder}/")
            if name in members:
                raise ShardError(f"{tar}: {member.name} comes twice")
            members[name] = member
    except ShardError as error:
        raise ShardError(str(error).replace(str(tar), str(archive))) from error
    if not members:
        raise ShardError(f"{archive} has no folder {folder}/: it is another archive")
    return members
