"""Matches the outputs of a model to the classes of the data: by name, or, where names are not known, by position."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from crate_dist.checkpoint.trained import Trained, class_ids_are_numbers
from crate_dist.data.folder import ImageFolder, Indexed
from crate_dist.data.index import ShardIndex
from crate_dist.evaluation.on_ranks import CannotMeasure

_SHOWN = 5
_IMAGENET = 1000
_WORDNET = re.compile(r"n[0-9]{8}")


@dataclass(frozen=True)
class Matching:
    """The outputs that are held against the labels of a split.

    by: "order" where model and data have the same classes in the same order; "wordnet" where the data have the numbers
    of ImageNet's classes and the model their WordNet ids; "number" where the model's classes were given no names but
    their numbers, "position" where it does not tell any, also where those of the first data set are taken for them
    columns: outputs that compete, those of the data's classes first, in their order; None: all, as they are
    competing: their number; outputs: the number that the model has
    classes, names: of the columns, as far as they are known
    alphabetical: positions are those of the names of folders, which tell no order of their own
    """

    by: Literal["order", "name", "wordnet", "number", "position"]
    columns: Sequence[int] | None
    competing: int
    outputs: int
    classes: Sequence[str]
    names: Sequence[str]
    alphabetical: bool = False

    def select(self, logits: Tensor) -> Tensor:
        """Takes logits (n, outputs) to (n, competing), such that label k of the data is column k."""
        if self.columns is None:
            return logits
        return logits[:, torch.tensor(self.columns, device=logits.device)]

    def describe(self) -> str:
        """Says in words how classes are matched; "" for the same classes in the same order."""
        if self.by == "order":
            return ""
        how = {
            "name": "by name",
            "wordnet": "by number, in the order of the WordNet ids",
            "number": "by position, as the shards that the model was trained on have numbers for names",
            "position": "by position, as the model does not tell the names of its classes",
        }[self.by]
        order = "; the folders are taken in alphabetical order, which may not be the model's" * self.alphabetical
        return f"classes are matched {how}{order}; {self.competing:,} of the model's {self.outputs:,} compete"


def match_classes(trained: Trained, index: Indexed, all_classes: bool = False) -> Matching:
    """Finds the outputs for the classes of a split, or of a folder.

    all_classes: lets the outputs compete that stand for none of them, too. They do in any case where the classes are
    those that the model was trained on, as in training.

    Raises CannotMeasure: the model does not know all of the classes, or a name does not say which class it is.
    """
    outputs, known, wanted = trained.model.config.num_classes, trained.classes, _wanted(trained, index)
    if known is not None and len(known) > outputs:
        raise CannotMeasure(f"{trained.name} names {len(known):,} classes, and has {outputs:,} outputs")
    numbers = known is not None and class_ids_are_numbers(known)
    most = len(known) if known is not None and numbers else outputs
    if len(wanted) > most:
        raise CannotMeasure(f"{index.place} has {len(wanted):,} classes, the model only {most:,}")
    named_so = wanted == list(index.classes)
    if known is not None and named_so and list(known) == wanted:
        same: Literal["order", "number", "position"] = trained.borrowed or ("number" if numbers else "order")
        alphabetical = same == trained.borrowed and _order_is_alphabetical(index)
        return Matching(same, None, outputs, outputs, wanted, index.class_names, alphabetical)
    named = None if numbers else known
    columns = _by_position(trained, index, most) if named is None else _by_name(trained.name, named, wanted, index)
    classes, names = wanted, list(index.class_names) if isinstance(index, ShardIndex) else list(wanted)
    if all_classes:
        taken = set(columns)
        others = [output for output in range(outputs) if output not in taken]
        rest = [known[output] if known and output < len(known) else f"output {output}" for output in others]
        columns, classes, names = columns + others, classes + rest, names + rest
    by: Literal["wordnet", "name", "number", "position"]
    by = "number" if numbers else "position" if known is None else "name" if named_so else "wordnet"
    alphabetical = named is None and _order_is_alphabetical(index)
    return Matching(trained.borrowed or by, columns, len(columns), outputs, classes, names, alphabetical)


def with_names_of(trained: Trained, index: Indexed) -> Trained:
    """Returns the model with the names of a split's classes, where it has as many and does not name them itself."""
    nameless = trained.classes is None or class_ids_are_numbers(trained.classes)
    if not nameless or index.num_classes != trained.model.config.num_classes or class_ids_are_numbers(index.classes):
        return trained
    return replace(trained, classes=tuple(index.classes), borrowed="position" if trained.classes is None else "number")


def are_wordnet_ids(names: Sequence[str]) -> bool:
    """Returns whether classes are called n01440764, say, as ImageNet's are, whose order is that of these names."""
    return all(map(_WORDNET.fullmatch, names))


def _order_is_alphabetical(index: Indexed) -> bool:
    """Returns whether a folder's classes stand in the order of the alphabet for want of another."""
    names = index.classes
    return isinstance(index, ImageFolder) and not (are_wordnet_ids(names) or all(map(str.isdecimal, names)))


def _wanted(trained: Trained, index: Indexed) -> list[str]:
    """Returns the names of a split's classes, as the model has them where the data have ImageNet's numbers.

    ImageNet-V2's folders are called 0 … 999. Read as text, they would stand in another order: 0, 1, 10, 100.
    """
    names, known = list(index.classes), trained.classes or ()
    numbers = all(name.isdecimal() and int(name) < _IMAGENET for name in names)
    told = isinstance(index, ImageFolder) or not class_ids_are_numbers(names)  # shards without names are numbered so
    if numbers and told and len(known) == _IMAGENET and are_wordnet_ids(known):
        return [sorted(known)[int(name)] for name in names]
    return names


def _by_position(trained: Trained, index: Indexed, most: int) -> list[int]:
    """Returns the output of every class of a split, for a model of `most` classes that it does not name."""
    if index.num_classes == most or class_ids_are_numbers(index.classes):
        return list(range(index.num_classes))
    if isinstance(index, ImageFolder) and all(name.isdecimal() and int(name) < most for name in index.classes):
        return list(map(int, index.classes))
    raise CannotMeasure(
        f"which of the {most:,} classes of {trained.name} the {index.num_classes:,} of {index.place} are cannot be "
        "told: the model does not name them. With shards of the data that it was trained on as --data, and these as "
        "--also, it takes their names"
    )


def _by_name(model: str, known: Sequence[str], wanted: Sequence[str], index: Indexed) -> list[int]:
    """Returns the output of every class of a split, whose names are `wanted`."""
    outputs = {name: output for output, name in enumerate(known)}
    if unknown := [name for name in wanted if name not in outputs]:
        more = f" and {len(unknown) - _SHOWN:,} more" if len(unknown) > _SHOWN else ""
        raise CannotMeasure(
            f"{model} does not know {len(unknown):,} of the {index.num_classes:,} classes of {index.place}: "
            f"{', '.join(map(repr, unknown[:_SHOWN]))}{more}; it knows {', '.join(map(repr, known[:_SHOWN]))}"
            f"{' …' if len(known) > _SHOWN else ''}. If these are the same under other names, "
            "`data_prep/index.py DIR --classes FILE` gives the shards the model's"
        )
    times = Counter(known)
    twice = [name for name, count in Counter(wanted).items() if count > 1 or times[name] > 1]
    if twice:
        raise CannotMeasure(
            f"{', '.join(map(repr, twice[:_SHOWN]))} is the name of several classes of {model} or of {index.place}, "
            "which are not in the same order: which is which cannot be told"
        )
    return [outputs[name] for name in wanted]
