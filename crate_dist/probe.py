"""Probes the features of a frozen model: by nearest neighbours, and by a linear classifier on top of them.

    python -m crate_dist.probe knn runs/crate_base --data /data/imagenet-shards
    python -m crate_dist.probe linear runs/crate_base --data /data/flowers-shards

take whatever `python -m crate_dist.evaluate` takes; the data may have other classes than the model was trained on. Both
splits are prepared as for evaluation. Under torchrun or srun the ranks share the work and the memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crate_dist.evaluation.options import probe_parser

if __name__ == "__main__":
    probe_parser(__doc__).parse_args()  # what ends here, such as --help, does not wait for the imports below

import torch
from tqdm import tqdm

from crate_dist.checkpoint.trained import Trained, find_layer, load_trained
from crate_dist.data.index import ShardIndex
from crate_dist.data.splits import check_same_classes, open_split
from crate_dist.distributed import exit_at_once
from crate_dist.evaluation import knn
from crate_dist.evaluation import linear as linear_probe
from crate_dist.evaluation.features import Features, check_pool, extract, pooled
from crate_dist.evaluation.on_ranks import (
    CannotMeasure,
    Frozen,
    check_output,
    run_on_ranks,
)
from crate_dist.files import write_whole
from crate_dist.models.config import Pool
from crate_dist.world import World


@dataclass(frozen=True)
class ProbeInputs:
    """A probe that fits model and data. layer: 1 … depth; pool: in place of the head's own."""

    trained: Trained
    train: ShardIndex
    val: ShardIndex
    layer: int
    pool: Pool | None

    def describe(self) -> str:
        """Names the feature in words."""
        config = self.trained.model.config
        place = f"after layer {self.layer} of {config.depth}"
        if config.head != "linear":
            return f"what the linear map of the head reads ({config.head}) {place}"
        tokens = "mean of the tokens" if (self.pool or config.pool) == "mean" else "class token"
        return f"{tokens} {place} and the head's norm"


def open_inputs(arguments: argparse.Namespace) -> ProbeInputs:
    """Opens what the command line names.

    Raises CannotMeasure, CheckpointError, WeightsError, RecipeError, ShardError: when it does not fit together.
    """
    check_output(arguments.json)
    if arguments.train_split == arguments.split:
        raise CannotMeasure(
            f"--train-split and --split are both {arguments.split!r}: every sample would find itself; give two"
        )
    trained = load_trained(arguments.model, arguments.heads, arguments.weights)
    names = arguments.train_split, arguments.split
    train, val = (open_split(arguments.data, name, trained.data) for name in names)
    check_same_classes(train, val)
    for split in (train, val):
        if not split.num_samples:
            raise CannotMeasure(f"{split.place} has no samples")
    config = trained.model.config
    if arguments.pool:
        check_pool(config, arguments.pool)
    return ProbeInputs(trained, train, val, find_layer(arguments.layer, config.depth), arguments.pool)


def features(model: Frozen, asked: ProbeInputs) -> tuple[Features, Features]:
    """Extracts the features of the training and of the validation split. A collective."""

    def read(images: torch.Tensor) -> torch.Tensor:
        return pooled(model.model, model.normalize(images), asked.layer, asked.pool)

    width = model.model.config.dim
    train, val = (
        extract(read, model.batches(split, name), width, split.num_samples, model.device)
        for split, name in ((asked.train, "train"), (asked.val, "val"))
    )
    return train, val


def main(argv: list[str] | None = None) -> int:
    """Makes one probe of one model on two splits, as the command line says."""
    arguments = probe_parser(__doc__).parse_args(argv)
    measure = _measure_knn if arguments.probe == "knn" else _measure_linear

    def work(asked: ProbeInputs, world: World, device: torch.device) -> None:
        model = Frozen.place(asked.trained, arguments, world, device)
        train, val = features(model, asked)
        measured = measure(arguments, train, val, asked, model)
        if world.is_main:
            _report(arguments.json, asked, train, val, {"probe": arguments.probe, **measured})

    return run_on_ranks(lambda: open_inputs(arguments), work)


def _measure_knn(
    arguments: argparse.Namespace, train: Features, val: Features, asked: ProbeInputs, model: Frozen
) -> dict[str, Any]:
    ks = sorted({min(k, train.total) for k in arguments.k})
    results = knn.classify(train, val, ks, arguments.temperature, _bar("neighbours", model))
    return {"temperature": arguments.temperature, "results": [asdict(result) for result in results]}


def _measure_linear(
    arguments: argparse.Namespace, train: Features, val: Features, asked: ProbeInputs, model: Frozen
) -> dict[str, Any]:
    result = linear_probe.probe(
        train, val, asked.train.num_classes, arguments.l2, arguments.seed, arguments.max_steps, _bar("l2", model)
    )
    return {"seed": arguments.seed, **asdict(result), "at_the_edge": result.at_the_edge}


def _bar(what: str, model: Frozen) -> Callable[[Any], Iterable[Any]]:
    return lambda items: tqdm(items, desc=what, disable=not model.shows, dynamic_ncols=True)


def _report(path: Path | None, asked: ProbeInputs, train: Features, val: Features, measured: dict[str, Any]) -> None:
    replaced = train.replaced + val.replaced
    print(  # noqa: T201
        f"{asked.trained.name}: {asked.describe()}, {train.values.shape[1]} numbers an image; "
        f"from the {train.total:,} samples of {asked.train.place} on the {val.total:,} of {asked.val.place}"
        + (f", {replaced} replaced" if replaced else "")
    )
    for line in _knn_lines(measured, train.total) if measured["probe"] == "knn" else _linear_lines(measured):
        print(line)  # noqa: T201
    if path is not None:
        config = asked.trained.model.config
        about = {
            "model": asked.trained.name,
            "train": str(asked.train.place),
            "val": str(asked.val.place),
            "train_samples": train.total,
            "val_samples": val.total,
            "replaced": replaced,
            "layer": asked.layer,
            "pool": asked.pool or (config.pool if config.head == "linear" else config.head),
        }
        write_whole(path, json.dumps({**about, **measured}, indent=1) + "\n")


def _knn_lines(measured: dict[str, Any], most: int) -> list[str]:
    return [
        f"  {result['k']:>4}-NN: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %"
        + (", k being all there are" if result["k"] == most else "")
        for result in measured["results"]
    ]


def _linear_lines(measured: dict[str, Any]) -> list[str]:
    lines = [
        f"  l2 {tried['l2']:<7g} held out: top-1 {tried['top1']:.2f} %  ({tried['steps']} steps{_short(tried)})"
        for tried in measured["sweep"]
    ]
    lines.append(
        f"  linear probe: top-1 {measured['top1']:.2f} %, top-5 {measured['top5']:.2f} %, with l2 {measured['l2']:g} "
        f"({measured['steps']} steps{_short(measured)})"
    )
    if measured["at_the_edge"]:
        lines.append("  the best l2 is at an end of those tried: one beyond it may be better, see --l2")
    return lines


def _short(fitted: dict[str, Any]) -> str:
    return "" if fitted["converged"] else ", short of the optimum: --max-steps"


if __name__ == "__main__":
    exit_at_once(main)
