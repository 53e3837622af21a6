"""ImageNet-C: the validation images with 15 corruptions in five severities, and the mean corruption error (mCE).

Hendrycks and Dietterich 2019 (arXiv 1903.12261, section 4.2): the corruption error of a model is the sum of its top-1
errors over the severities, divided by AlexNet's; the mCE is the mean of these over the 15 corruptions. The published
images are 224 pixels wide already, and are not cropped again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crate_dist.data.index import ShardError
from crate_dist.evaluation.accuracy import Evaluation

SEVERITIES = range(1, 6)
IMAGES = 50_000
ALEXNET_ERRORS = {
    "gaussian_noise": 88.6428,
    "shot_noise": 89.4468,
    "impulse_noise": 92.2640,
    "defocus_blur": 81.9880,
    "glass_blur": 82.6268,
    "motion_blur": 78.5948,
    "zoom_blur": 79.8360,
    "snow": 86.6816,
    "frost": 82.6572,
    "fog": 81.9324,
    "brightness": 56.4592,
    "contrast": 85.3204,
    "elastic_transform": 64.6056,
    "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}
"""AlexNet's top-1 error in per cent, mean of the five severities: the authors' table for the mCE, which
github.com/hendrycks/robustness leads to ("Calculating the mCE")."""
EXTRA = ("gaussian_blur", "saturate", "spatter", "speckle_noise")
"""Published besides, to choose settings by, and no part of the mCE: evaluated only where one is asked for alone."""
_DEPTH = 2  # the published archives each hold the corruptions of one kind, as in blur/defocus_blur


@dataclass(frozen=True)
class Corruptions:
    """A folder of ImageNet-C. folders: corruption -> severity -> folder of class folders, as far as they are there"""

    root: Path
    folders: Mapping[str, Mapping[int, Path]]

    @classmethod
    def find(cls, root: Path) -> Corruptions | None:
        """Looks for folders called as the corruptions, with 1 … 5 in them. None: this is no ImageNet-C.

        The root may be one corruption itself, or one severity of it. Classes may be called as corruptions, too.
        Raises ShardError: some corruptions without severities, or one that lies there twice.
        """
        if (part := _part(root)) is not None:
            return cls(root, part)
        found: dict[str, Path] = {}
        for path in _folders(root, _DEPTH):
            if path.name in ALEXNET_ERRORS:
                if path.name in found:
                    raise ShardError(f"{root} holds {path.name} twice: {found[path.name]} and {path}; leave one")
                found[path.name] = path
        folders = {name: _severities(found[name]) for name in ALEXNET_ERRORS if name in found}
        empty = [str(found[name]) for name, severities in folders.items() if not severities]
        if len(empty) == len(folders):
            return None
        if empty:
            raise ShardError(f"{empty[0]} has none of the folders 1 to 5, the severities of ImageNet-C")
        return cls(root, folders)

    @property
    def name(self) -> str:
        """A short one: of the root, that of one severity with its corruption."""
        root = self.root.absolute()
        return f"{root.parent.name}/{root.name}" if root.parent.name in self.folders else root.name

    def __len__(self) -> int:
        return sum(map(len, self.folders.values()))


@dataclass(frozen=True)
class Corrupted:
    """What a model does on ImageNet-C. results: corruption -> severity -> accuracy; may grow"""

    results: Mapping[str, Mapping[int, Evaluation]]

    def error(self, corruption: str) -> float:
        """Returns the mean top-1 error of the severities, in per cent."""
        severities = self.results[corruption].values()
        return sum(100 - result.top1 for result in severities) / len(severities)

    def corruption_error(self, corruption: str) -> float | None:
        """Returns the error relative to AlexNet's, in per cent; None where that or an image is missing."""
        images = [result.samples + result.unreadable for result in self.results[corruption].values()]
        if corruption in EXTRA or images != [IMAGES] * len(SEVERITIES):
            return None
        return 100 * self.error(corruption) / ALEXNET_ERRORS[corruption]

    @property
    def samples(self) -> int:
        """Images that count, of all severities."""
        return sum(one.samples for severities in self.results.values() for one in severities.values())

    @property
    def mean_error(self) -> float:
        """The mean top-1 error of the corruptions, in per cent."""
        return sum(map(self.error, self.results)) / len(self.results)

    @property
    def mce(self) -> float | None:
        """The mean corruption error in per cent: AlexNet has 100. None where it would not compare to that of others."""
        errors = [error for name in self.results if (error := self.corruption_error(name)) is not None]
        return sum(errors) / len(errors) if len(errors) == len(ALEXNET_ERRORS) else None

    def record(self) -> dict[str, Any]:
        """Returns everything, as in JSON."""
        errors = {
            name: {
                "error": self.error(name),
                "by_severity": {severity: 100 - one.top1 for severity, one in severities.items()},
                "corruption_error": self.corruption_error(name),
            }
            for name, severities in self.results.items()
        }
        return {"mce": self.mce, "mean_error": self.mean_error, "corruptions": errors}

    def row(self, corruption: str) -> str:
        """Returns the line of a corruption in the table of errors."""
        severities = self.results[corruption]
        each = (f"{100 - severities[n].top1:7.2f}" if n in severities else f"{'-':>7}" for n in SEVERITIES)
        relative = _number(self.corruption_error(corruption))
        return f"{corruption:20}{''.join(each)}{self.error(corruption):8.2f}{relative}"

    def last_rows(self) -> list[str]:
        """Returns the line of the mean, and what it means."""
        if self.mce is not None:
            meaning = "CE: the error relative to AlexNet's, in %; the mean of these is the mCE"
        else:
            meaning = (
                f"no mCE: that takes all {len(ALEXNET_ERRORS)} corruptions, in 5 severities, of all {IMAGES:,} images"
            )
        return [f"{'mean':55}{self.mean_error:8.2f}{_number(self.mce)}", meaning]


HEADING = f"{'top-1 error, %':20}" + "".join(f"{severity:7}" for severity in SEVERITIES) + "    mean      CE"
"""The first line of the table of errors."""


def _number(number: float | None) -> str:
    return f"{'-':>8}" if number is None else f"{number:8.2f}"


def _folders(root: Path, depth: int) -> list[Path]:
    """Lists the folders in a folder, and those in them that are not called as a corruption, in order."""
    try:
        with os.scandir(root) as entries:
            here = sorted(Path(entry.path) for entry in entries if entry.name[0] != "." and entry.is_dir())
    except OSError:  # whoever asks for shards next says what is wrong
        return []
    if depth == 1 or len(here) > len(ALEXNET_ERRORS) + len(EXTRA):  # classes, a thousand of them perhaps
        return here
    below = [path for folder in here if folder.name not in ALEXNET_ERRORS for path in _folders(folder, depth - 1)]
    return here + below


def _severities(folder: Path) -> dict[int, Path]:
    return {severity: folder / str(severity) for severity in SEVERITIES if (folder / str(severity)).is_dir()}


def _part(root: Path) -> dict[str, dict[int, Path]] | None:
    """Returns the one corruption, or the one severity of it, that `root` is. None: neither.

    With folders in it, it has classes; without, 1 … 5 are the classes of some other data.
    """
    place, names = root.absolute(), (*ALEXNET_ERRORS, *EXTRA)
    if place.name in names:
        severities = {severity: path for severity, path in _severities(root).items() if _folders(path, 1)}
        return {place.name: severities} if severities else None
    if place.parent.name in names and place.name in map(str, SEVERITIES) and _folders(root, 1):
        return {place.parent.name: {int(place.name): root}}
    return None
