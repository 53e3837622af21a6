"""The data sets of an evaluation: splits of shards, folders of class folders, ImageNet-C."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crate_dist.checkpoint.trained import Trained
from crate_dist.config import DataSection
from crate_dist.data.folder import ImageFolder, Indexed, class_folders
from crate_dist.data.index import INDEX_JSON
from crate_dist.data.splits import open_split
from crate_dist.evaluation.corruptions import Corruptions
from crate_dist.evaluation.matching import Matching, match_classes, with_names_of
from crate_dist.evaluation.on_ranks import CannotMeasure


@dataclass(frozen=True)
class EvalSet:
    """Images and the outputs of the model that stand for their classes.

    corruptions: the whole of ImageNet-C, of which `index` is one part
    """

    name: str
    index: Indexed
    matching: Matching
    corruptions: Corruptions | None = None

    def describe(self) -> str:
        """Says what is to be evaluated, and how its classes are matched."""
        parts = f" in each of {len(self.corruptions)} folders" if self.corruptions else ""
        matched = self.matching.describe()
        where = self.corruptions.root if self.corruptions else self.index.place
        return f"{where}: {self.index.num_samples:,} images of {self.index.num_classes:,} classes{parts}" + (
            f"; {matched}" if matched else ""
        )


def open_sets(
    data: Path | str | None, also: Sequence[Path | str], split: str, trained: Trained, all_classes: bool
) -> list[EvalSet]:
    """Opens every data set, before anything is evaluated. data: None for the run's own, as find_root has it

    Raises CannotMeasure, ShardError, RecipeError: one that is none, is empty, or has classes that the model has not.
    """
    sets: list[EvalSet] = []
    for place in (data, *also):
        corruptions = Corruptions.find(place) if isinstance(place, Path) else None
        index = _first(corruptions) if corruptions else open_set(place, split, trained.data)
        if not index.num_samples:
            raise CannotMeasure(f"{index.place} has no samples")
        if not sets:
            trained = with_names_of(trained, index)
        name = corruptions.name if corruptions else _name(index, place, split)
        sets.append(EvalSet(name, index, match_classes(trained, index, all_classes), corruptions))
    return sets


def open_set(place: Path | str | None, split: str, data: DataSection) -> Indexed:
    """Opens shards, by their folder or URL or the folder of one split, or a folder of class folders.

    ImageNet-Sketch's archive has its class folders in a folder of their own, and ImageNet in one for each split.
    """
    if not isinstance(place, Path) or not place.is_dir() or (place / split / INDEX_JSON).is_file():
        return open_split(place, split, data)
    if (place / INDEX_JSON).is_file():
        return open_split(place.absolute().parent, place.absolute().name, data)
    folders = class_folders(place)
    inside = split if split in folders else folders[0] if len(folders) == 1 else None
    if inside is not None and class_folders(place / inside):
        return ImageFolder.load(place / inside)
    if not folders or any(any((place / folder).glob("*.tar")) for folder in folders[:8]):
        return open_split(place, split, data)  # which says what is missing
    return ImageFolder.load(place)


def _first(corruptions: Corruptions) -> ImageFolder:
    severities = next(iter(corruptions.folders.values()))
    return ImageFolder.load(next(iter(severities.values())))


def _name(index: Indexed, place: Path | str | None, split: str) -> str:
    """Returns a short name for the table: of the folder that was given, and what was looked for in it."""
    root = index.root.absolute()
    if isinstance(index, ImageFolder):
        assert isinstance(place, Path)
        return str(root.relative_to(place.absolute().parent))
    return split if index.remote else str(root.relative_to(root.parents[1]))
