"""Measures exact top-1 and top-5 over every sample of a split that can be read, once each, at any number of ranks.

    python -m crate_dist.evaluate runs/crate_base --data /data/imagenet-shards
    python -m crate_dist.evaluate runs/crate_base --worst 20 --confusions 20 --json evaluation.json
    python -m crate_dist.evaluate runs/crate_base --real real.json --also /data/imagenet-a /data/imagenet-c

takes a run folder (its newest checkpoint), one of its checkpoints, or a file of weights: an export of ours or a
checkpoint of the published code. Under torchrun or srun the ranks share the work. Data are shards, or images in class
folders as ImageNet-V2, -A, -R, -Sketch and -C are published.

Data with other classes than the model's, in names or order, are matched by name where the model knows all of them, and
these classes alone compete, as is usual for ImageNet-A and -R; --all-classes lets all of the model's.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from crate_dist.evaluation.options import evaluate_parser

if __name__ == "__main__":
    evaluate_parser(__doc__).parse_args()  # what ends here, such as --help, does not wait for the imports below

import torch
import torch.distributed as dist

from crate_dist.checkpoint.trained import Trained, load_trained
from crate_dist.config import ImageSection
from crate_dist.data.folder import ImageFolder, Indexed
from crate_dist.distributed import exit_at_once
from crate_dist.evaluation.accuracy import ClassCounts, Evaluation, Tally, evaluate
from crate_dist.evaluation.calibration import Calibrator
from crate_dist.evaluation.corruptions import HEADING, Corrupted, Corruptions
from crate_dist.evaluation.on_ranks import (
    CannotMeasure,
    Frozen,
    check_output,
    run_on_ranks,
)
from crate_dist.evaluation.real import RealCounts, RealLabels
from crate_dist.evaluation.report import (
    CorruptedOutcome,
    Outcome,
    class_lines,
    confusion_lines,
    reliability_lines,
    summary,
    write_classes,
)
from crate_dist.evaluation.sets import EvalSet, open_sets
from crate_dist.evaluation.throughput import Throughput, measure_throughput
from crate_dist.files import write_whole
from crate_dist.world import World


def main(argv: list[str] | None = None) -> int:
    """Evaluates one model on one data set or several, as the command line says."""
    arguments = evaluate_parser(__doc__).parse_args(argv)

    def prepare() -> _Prepared:
        check_output(arguments.json)
        check_output(arguments.csv)
        trained = load_trained(arguments.model, arguments.heads, arguments.weights)
        trained = replace(trained, images=_prepared_as_asked(trained.images, arguments))
        sets = open_sets(arguments.data, arguments.also, arguments.split, trained, arguments.all_classes)
        if sets[0].corruptions and (dropped := [option for option in _OF_DATA if _is_given(arguments, option)]):
            raise CannotMeasure(
                f"{', '.join(dropped)}: not of ImageNet-C, {sets[0].corruptions.root}; give the shards as --data, and "
                "ImageNet-C as --also"
            )
        return trained, sets, RealLabels.read(arguments.real, sets[0].index) if arguments.real else None

    return run_on_ranks(prepare, lambda prepared, world, device: _work(arguments, prepared, world, device))


_OF_DATA = ("--real", "--per-class", "--worst", "--confusions", "--reliability", "--csv")
"""Options that ask for more of what is found on --data."""
_Prepared = tuple[Trained, list[EvalSet], RealLabels | None]
_Say = Callable[[str], object]


def _prepared_as_asked(images: ImageSection, arguments: argparse.Namespace) -> ImageSection:
    """Returns how images are prepared, with what --crop and --resize-filter say otherwise."""
    asked = {"eval_fit": "crop", "eval_crop": arguments.crop} if arguments.crop else {}
    asked |= {"resize_filter": arguments.resize_filter} if arguments.resize_filter else {}
    return images.model_copy(update=asked)


def _is_given(arguments: argparse.Namespace, option: str) -> bool:
    return bool(getattr(arguments, option.removeprefix("--").replace("-", "_")))


def _work(arguments: argparse.Namespace, prepared: _Prepared, world: World, device: torch.device) -> None:
    trained, sets, real = prepared
    say: _Say = print if world.is_main else len
    if arguments.dry_run:
        for one in sets:
            say(one.describe())
        return
    model = Frozen.place(trained, arguments, world, device)
    if arguments.max_bad_fraction is None:
        arguments.max_bad_fraction = trained.data.max_bad_fraction
    outcomes: list[Outcome | CorruptedOutcome] = []
    told = ""
    for one in sets:
        if one.corruptions:
            outcomes.append(_evaluate_corrupted(model, one, one.corruptions, arguments.max_bad_fraction, say))
        else:
            outcome = _evaluate(model, one, arguments.max_bad_fraction, None if outcomes else real)
            lines = outcome.lines(model.name, world.world_size, told)
            for line in lines if outcomes else [*lines, *_more(arguments, outcome)]:
                say(line)
            outcomes.append(outcome)
        told = one.matching.describe()
        _write(arguments, model, outcomes, None)  # what takes hours may end before its time
    for line in summary(outcomes) if len(outcomes) > 1 else ():
        say(line)
    if arguments.throughput:
        from crate_dist.training.compiling import compile_model  # torch's compiler takes its time to import

        speed = measure_throughput(model, lambda once: compile_model(model.model, once, device))
        say(speed.describe())
        _write(arguments, model, outcomes, speed)


def _evaluate(model: Frozen, asked: EvalSet, max_bad_fraction: float, real: RealLabels | None) -> Outcome:
    """Evaluates on one data set. A collective."""
    index, matching = asked.index, asked.matching
    classes, calibrator = ClassCounts(index.num_classes, model.device), Calibrator(model.device)
    tallies: list[Tally] = [classes, calibrator]
    real_counts = RealCounts(real, index) if real else None
    if real_counts:
        tallies.append(real_counts)
    dist.barrier()
    began = time.perf_counter()
    result = evaluate(
        lambda images: matching.select(model.logits(images)), model.batches(index, asked.name), model.device, tallies
    )
    seconds = time.perf_counter() - began
    _check(result, index, max_bad_fraction)
    found = real_counts.total() if real_counts else None
    return Outcome(asked, result, calibrator.total(), classes.total(), found, seconds)


def _evaluate_corrupted(
    model: Frozen, asked: EvalSet, corruptions: Corruptions, max_bad_fraction: float, say: _Say
) -> CorruptedOutcome:
    """Evaluates on every severity of every corruption, and says what each does. A collective."""
    results: dict[str, dict[int, Evaluation]] = {}
    corrupted = Corrupted(results)
    say(f"{model.name} on {corruptions.root}:")
    if words := asked.matching.describe():
        say(words)
    say(HEADING)
    began, done = time.perf_counter(), 0
    for name, severities in corruptions.folders.items():
        results[name] = {}
        for severity, folder in severities.items():
            index, done = ImageFolder.load(folder), done + 1
            if index.classes != asked.index.classes:
                raise CannotMeasure(f"{folder} does not have the classes of {asked.index.place}: it is incomplete")
            batches = model.batches(index, f"{name} {severity} ({done}/{len(corruptions)})", cropped=True)
            result = evaluate(lambda images: asked.matching.select(model.logits(images)), batches, model.device)
            _check(result, index, max_bad_fraction)
            results[name][severity] = result
        say(corrupted.row(name))
    for line in corrupted.last_rows():
        say(line)
    return CorruptedOutcome(asked, corrupted, time.perf_counter() - began)


def _check(result: Evaluation, index: Indexed, max_bad_fraction: float) -> None:
    if problem := result.problem(max_bad_fraction):
        raise CannotMeasure(f"{index.place}: {problem}; --max-bad-fraction, now {max_bad_fraction}, lets more pass")
    if not math.isfinite(result.loss):
        raise CannotMeasure(
            f"the loss on {index.place} is {result.loss}: weights that are not finite, or sums that overflow; "
            "--precision fp32 helps against the latter"
        )


def _more(arguments: argparse.Namespace, outcome: Outcome) -> list[str]:
    """Returns the tables that were asked for of the first data set."""
    lines = class_lines(outcome, arguments.worst) if arguments.per_class or arguments.worst else []
    if arguments.confusions:
        lines += confusion_lines(outcome, arguments.confusions)
    if arguments.reliability:
        lines += reliability_lines(outcome.calibration)
    return lines


def _write(
    arguments: argparse.Namespace,
    model: Frozen,
    outcomes: Sequence[Outcome | CorruptedOutcome],
    speed: Throughput | None,
) -> None:
    """Writes on rank 0 what is known by now; the first data set's numbers stand at the top of the JSON."""
    if not model.world.is_main:
        return
    first = outcomes[0]
    if arguments.csv is not None and isinstance(first, Outcome):
        write_classes(arguments.csv, first)
    if arguments.json is not None:
        first_record, *others = [outcome.record() for outcome in outcomes]
        whole = {"model": model.name, "images": model.images.model_dump(), **first_record}
        whole |= {"ranks": model.world.world_size, "also": others}
        whole["throughput"] = asdict(speed) if speed else None
        write_whole(arguments.json, json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    exit_at_once(main)
