"""Begins a fine-tuning run: opens other weights, fits them to the recipe's model, the same on all ranks."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from crate_dist.checkpoint.trained import Trained, class_ids_are_numbers, load_trained
from crate_dist.config import RecipeError, WeightsKind
from crate_dist.distributed import gather_objects
from crate_dist.errors import UserError
from crate_dist.models.adapt import adapt, map_head
from crate_dist.models.transformer import Transformer
from crate_dist.models.weights.names import StateDict, WeightsError

logger = logging.getLogger(__name__)

_SHOWN = 5


@dataclass(frozen=True)
class Origin:
    """The weights that a run began from: their source, SHA-256 of names and fp32 values, and the changes made."""

    weights: str
    sha256: str
    changes: tuple[str, ...]


def begin_from(
    source: Path,
    model: Transformer,
    classes: Sequence[str],
    head: Literal["auto", "new", "keep", "map"] = "auto",
    heads: int | None = None,
    kind: WeightsKind | None = None,
) -> Origin:
    """Copies the weights of a run, a checkpoint or a file into a model that is freshly initialised. A collective.

    classes: ids of the data's classes
    head: "new" and "keep" as they say; "auto" keeps the head where the classes are the same. A file that knows only
    how many classes it has, as all of the published code's, is believed to know the same ones, and so are classes that
    have numbers for names on both sides; the log says so. "map" takes the rows of the classes that both have, by id,
    and new ones for the others.
    heads: of MSSA, where a file of weights does not tell how many; kind: of weights, see load_trained

    Raises RecipeError: on every rank, when one of them cannot use the weights, or they do not all find the same ones.
    """
    problem, digest, adapted, mapped = "", "", None, ""
    try:
        trained = load_trained(source, heads, kind)
        weights = trained.model.state_dict()
        digest = weights_digest(weights)
        config = trained.model.config
        if head == "map":
            adapt(weights, config, model.config, new_head=True)  # refuses what fits no model of this size, in its words
            rows, mapped = _rows(trained, classes, model.config.num_classes)
            weights = map_head(weights, model.state_dict(), rows)
            config = replace(config, num_classes=model.config.num_classes)
        new_head = head == "new" or (head == "auto" and not _same_classes(trained, model, classes))
        adapted = adapt(weights, config, model.config, new_head)
    except UserError as error:
        problem = f"--init-from {source}: {error}"
    found = gather_objects((problem, digest))
    if problem := next((text for text, _ in found if text), ""):
        raise RecipeError(problem)
    if len(set(found)) > 1:
        raise RecipeError(f"--init-from {source}: the ranks find different weights there; is it being written to?")
    assert adapted is not None
    own = model.state_dict()
    model.load_state_dict({**own, **adapted.state_dict})
    changes = (*adapted.notes, *filter(None, [mapped]))
    if (
        not mapped
        and "head.linear.weight" in adapted.state_dict
        and (trained.classes is None or class_ids_are_numbers(trained.classes))
    ):
        why = "the names of which it does not tell" if trained.classes is None else "which have numbers for names there"
        remedy = "" if head == "keep" else "; --set train.init_head=new if they are others"
        changes += (f"head kept by number for {model.config.num_classes} classes, {why}{remedy}",)
    logger.info(
        "began from %s: %d of %d tensors; %s; sha256 %s",
        trained.name,
        len(adapted.state_dict),
        len(own),
        "; ".join(changes) or "as they are",
        digest[:16],
    )
    return Origin(trained.name, digest, changes)


def weights_digest(weights: StateDict) -> str:
    """Returns the SHA-256 of the names and fp32 values of weights on the CPU, whatever file they came in."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _same_classes(trained: Trained, model: Transformer, classes: Sequence[str]) -> bool:
    if trained.model.config.num_classes != model.config.num_classes:
        return False
    return trained.classes is None or list(trained.classes) == list(classes)


def _rows(trained: Trained, classes: Sequence[str], outputs: int) -> tuple[list[int | None], str]:
    """Returns for each output the row of the other head with its class, None where there is none, and that in words.

    Raises WeightsError when the other model does not name its classes, or none of them is one of `classes`.
    """
    known = trained.classes
    if known is None or class_ids_are_numbers(known):
        raise WeightsError(
            'train.init_head = "map" takes rows of the head by the ids of classes, which it does not tell; '
            "a run or an export on shards with ids does, and train.init_head=new needs none"
        )
    there = {name: row for row, name in enumerate(known)}
    rows = [there.get(name) for name in classes]
    new = [name for name in classes if name not in there]
    if len(new) == len(classes):
        raise WeightsError(
            f'train.init_head = "map": none of the {len(classes):,} classes of the data ({", ".join(classes[:3])}, …) '
            f"is one of its {len(known):,} ({', '.join(known[:3])}, …); train.init_head=new makes a new head"
        )
    text = f"head mapped by class, {len(classes) - len(new):,} rows taken from its {len(known):,}"
    if new:
        text += f", {len(new):,} new: {', '.join(new[:_SHOWN])}{', …' if len(new) > _SHOWN else ''}"
    return rows + [None] * (outputs - len(rows)), text
