"""Measures exact top-1 and top-5 over every sample of a split that can be read, once each, at any number of ranks.

    python -m crate_dist.evaluate runs/crate_base --data /data/imagenet-shards
    python -m crate_dist.evaluate runs/crate_base --worst 20 --confusions 20 --json evaluation.json

takes a run folder (its newest checkpoint), one of its checkpoints, or a file of weights: an export of ours or a
checkpoint of the published code. Under torchrun or srun the ranks share the work.

Data with other classes than the model's, in names or order, are matched by name where the model knows all of them, and
these classes alone compete, as is usual for ImageNet-A and -R; --all-classes lets all of the model's.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from crate_dist.arguments import Parser, positive
from crate_dist.checkpoint.trained import Trained, load_trained
from crate_dist.data.index import ShardIndex
from crate_dist.data.splits import open_split
from crate_dist.distributed import exit_at_once
from crate_dist.evaluation.accuracy import ClassAccuracies, ClassCounts, Evaluation, class_text, evaluate
from crate_dist.evaluation.matching import Matching, match_classes
from crate_dist.evaluation.on_ranks import (
    CannotMeasure,
    Frozen,
    add_arguments,
    check_output,
    run_on_ranks,
)
from crate_dist.files import write_whole
from crate_dist.world import World

_NAMED = 5


def main(argv: list[str] | None = None) -> int:
    """Evaluates one model on one split, as the command line says."""
    parser = Parser(prog="python -m crate_dist.evaluate", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--split", default="val", metavar="NAME", help="folder in DIR [%(default)s]")
    parser.add_argument(
        "--all-classes", action="store_true", help="where the data have fewer classes, let all of the model's compete"
    )
    parser.add_argument(
        "--max-bad-fraction", type=float, metavar="X", help="of the samples may be unreadable [as in training]"
    )
    shown = parser.add_argument_group("class by class")
    shown.add_argument("--per-class", action="store_true", help="print a line for every class, the worst first")
    shown.add_argument("--worst", type=positive, metavar="N", help="print those of the N worst classes alone")
    shown.add_argument("--confusions", type=positive, metavar="N", help="print the N most frequent confusions")
    shown.add_argument("--csv", type=Path, metavar="FILE", help="write the table of classes there")
    arguments = parser.parse_args(argv)

    def prepare() -> tuple[Trained, ShardIndex, Matching]:
        check_output(arguments.json)
        check_output(arguments.csv)
        trained = load_trained(arguments.model, arguments.heads)
        index = open_split(arguments.data, arguments.split, trained.data)
        if not index.num_samples:
            raise CannotMeasure(f"{index.place} has no samples")
        return trained, index, match_classes(trained, index, arguments.all_classes)

    def work(prepared: tuple[Trained, ShardIndex, Matching], world: World, device: torch.device) -> None:
        trained, index, matching = prepared
        model = Frozen.place(trained, arguments, world, device)
        tally = ClassCounts(index.num_classes, device)

        def predict(images: torch.Tensor) -> torch.Tensor:
            return matching.select(model.logits(images))

        dist.barrier()
        began = time.perf_counter()
        result = evaluate(predict, model.batches(index, arguments.split), device, tally)
        seconds = time.perf_counter() - began
        asked = arguments.max_bad_fraction
        _check(result, index, trained.data.max_bad_fraction if asked is None else asked)
        by_class = tally.total()
        if world.is_main:
            _report(arguments, trained, index, matching, world, result, by_class, seconds)

    return run_on_ranks(prepare, work)


def _check(result: Evaluation, index: ShardIndex, max_bad_fraction: float) -> None:
    if problem := result.problem(max_bad_fraction):
        raise CannotMeasure(f"{index.place}: {problem}; --max-bad-fraction, now {max_bad_fraction}, lets more pass")
    if not math.isfinite(result.loss):
        raise CannotMeasure(
            f"the loss on {index.place} is {result.loss}: weights that are not finite, or sums that overflow; "
            "--precision fp32 helps against the latter"
        )


def _report(
    arguments: argparse.Namespace,
    trained: Trained,
    index: ShardIndex,
    matching: Matching,
    world: World,
    result: Evaluation,
    by_class: ClassAccuracies,
    seconds: float,
) -> None:
    """Prints and writes the result. seconds: of the whole pass, the start of the loader's workers among them."""
    rate = result.samples / seconds
    print(  # noqa: T201
        f"{trained.name} on {index.place}: top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %, "
        f"loss {result.loss:.4f}, {result.samples:,} samples"
        + f"; {rate:,.0f} images/s"
        + (f", {rate / world.world_size:,.0f} on each of {world.world_size} ranks" if world.world_size > 1 else "")
    )
    if result.unreadable:
        total, named = result.samples + result.unreadable, [f"{item.key} of {item.shard}" for item in result.bad]
        which = ", ".join(named[:_NAMED]) + (", …" if len(named) > _NAMED else "")
        print(f"{result.unreadable:,} of {total:,} samples could not be read and do not count: {which}")  # noqa: T201
    if words := matching.describe():
        print(words)  # noqa: T201
    records = by_class.records(matching.classes, matching.names)
    if arguments.per_class or arguments.worst:
        _print_classes(index, [records[label] for label in by_class.worst_first()[: arguments.worst]])
        if absent := int((by_class.samples == 0).sum()):
            print(f"{absent} more classes have no sample in this split")  # noqa: T201
    if arguments.confusions:
        _print_confusions(by_class.confusions(matching.classes, matching.names, arguments.confusions))
    if arguments.csv is not None:
        table = io.StringIO()
        writer = csv.DictWriter(table, fieldnames=list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        write_whole(arguments.csv, table.getvalue())
    if arguments.json is not None:
        whole: dict[str, Any] = {"model": trained.name, "data": str(index.place), **asdict(result)}
        whole["bad"] = [item._asdict() for item in result.bad]
        whole |= {"seconds": seconds, "images_per_s": rate, "ranks": world.world_size}
        whole |= {"matched_by": matching.by, "competing": matching.competing, "model_classes": matching.outputs}
        whole |= {"classes": records, "confusions": by_class.confusions(matching.classes, matching.names)}
        write_whole(arguments.json, json.dumps(whole, indent=1) + "\n")


def _print_classes(index: ShardIndex, records: list[dict[str, Any]]) -> None:
    print("\n   top-1     top-5  samples  class")  # noqa: T201
    for record in records:
        text = class_text(index.classes, index.class_names, record["label"])
        print(f"{record['top1']:6.2f} %  {record['top5']:6.2f} %  {record['samples']:7,}  {text}")  # noqa: T201


def _print_confusions(confusions: list[dict[str, Any]]) -> None:
    print("\n  times  of the class  true -> predicted")  # noqa: T201
    for item in confusions:
        print(f"{item['count']:7,}  {item['share']:10.2f} %  {item['true']} -> {item['predicted']}")  # noqa: T201


if __name__ == "__main__":
    exit_at_once(main)
