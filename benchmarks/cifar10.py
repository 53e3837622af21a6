"""Does our trainer learn what the published code learns? CIFAR-10, a small CRATE, several seeds of each.

    python benchmarks/cifar10.py prepare --source DIR         DIR/train/<class>/<image>, DIR/test/<class>/<image>
    python benchmarks/cifar10.py equal --reference PATH       same weights, same batches: the losses step by step
    python benchmarks/cifar10.py ours --seeds 0 1 2           launch/local.py, from shards
    python benchmarks/cifar10.py published --reference PATH --seeds 0 1 2
    python benchmarks/cifar10.py finetune --seeds 0 1 2       five classes, after the other five and from scratch
    python benchmarks/cifar10.py report --figure FILE         the tables and the curves of what has been run

--reference is a checkout of the published code: its model is imported from there, its loop is published.py.
Everything lies in --work; what has been run already is not run again, and a run of ours goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import measuring  # isort: skip
import cifar10_report
import torch
from published import FILTERS, Normalise, class_folders, seeded_loop, train_epochs
from tqdm import tqdm

from crate_dist.config import Recipe, RecipeError, load_recipe
from crate_dist.data.loader import Share, TrainLoader, eval_loader, eval_transform, train_transform
from crate_dist.data.order import training_order
from crate_dist.data.splits import open_splits
from crate_dist.distributed import init_distributed, leave_distributed
from crate_dist.files import write_whole
from crate_dist.models.build import build_model
from crate_dist.training.optim import Schedule, learning_rate
from crate_dist.world import detect_world

REPO = Path(__file__).resolve().parents[1]
HALVES = {"first": slice(0, 5), "last": slice(5, 10)}
"""Class folders in sorted order: disjoint classes, hence disjoint images."""
SHORT = ["train.epochs=2", "optim.warmup_epochs=1"]
"""The small budget that both contestants of `finetune` have."""
MARKS = (1, 10, 100)
"""Steps up to which the largest difference of the losses is told, beside that of all."""


def main() -> int:
    """Runs one step. Returns the exit status."""
    arguments = parse()
    try:
        arguments.run(arguments)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"error: exit status {error.returncode} of {shlex.join(error.cmd)}", file=sys.stderr)
        return 1
    return 0


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = measuring.parser(__doc__)
    steps = parser.add_subparsers(required=True, metavar="STEP")
    recipe, option = measuring.arch("cifar10_small"), measuring.option
    reference = option("--reference", type=Path, required=True, metavar="PATH", help="the published code")
    seeds = option("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="[0 1 2]")
    source = option("--source", type=Path, required=True, metavar="DIR", help="class folders of JPEGs")
    count = option("--steps", type=int, default=500, metavar="N", help="[%(default)s]")
    resize = option("--filter", choices=list(FILTERS), default="bilinear", help="of its resize [its own: %(default)s]")
    figure = option("--figure", type=Path, metavar="FILE", help="draw the curves here, as .png, .pdf or .svg")
    for step, parents in {
        prepare: [recipe, source],
        equal: [recipe, reference, count, measuring.JSON],
        ours: [recipe, seeds],
        published: [recipe, reference, seeds, resize],
        finetune: [recipe, seeds],
        report: [figure, measuring.JSON],
    }.items():
        summary = (step.__doc__ or "").partition("\n")[0]
        sub = steps.add_parser(step.__name__, help=summary, description=summary, parents=parents)
        sub.set_defaults(run=step)
        sub.add_argument("--work", type=Path, default=Path("runs/cifar10"), metavar="DIR", help="[%(default)s]")
    return parser.parse_args()


def prepare(arguments: argparse.Namespace) -> None:
    """Copies the images to WORK/images, and converts them to shards: all ten classes, the first and the last five."""
    source, images = arguments.source, arguments.work / "images"
    classes, _ = class_folders(source / "train")
    for name, part in {"all": slice(None), **HALVES}.items():
        if not (images / name).is_dir():
            beside = images / f"{name}.tmp"
            shutil.rmtree(beside, ignore_errors=True)
            for split in ("train", "test"):
                for label in classes[part]:
                    shutil.copytree(source / split / label, beside / split / label)
            beside.rename(images / name)
        shards = arguments.work / "shards" / name
        run("data_prep/image_folder.py", "--source", images / name, "--out", shards, "--shard-samples", 1000)


def equal(arguments: argparse.Namespace) -> None:
    """Takes the same steps with both, from the same weights; how far the losses and the logits come apart."""
    root = (arguments.work / "shards" / "all").absolute()
    recipe = load_recipe(arguments.arch, arguments.overrides, data__root=str(root))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    device = init_distributed(detect_world())
    try:
        result = compare(recipe, arguments.reference, arguments.steps, device)
    finally:
        leave_distributed()
    print(json.dumps(result, indent=1))
    for path in (arguments.work / "equal.json", arguments.json):
        measuring.write_json(path, result)


def ours(arguments: argparse.Namespace) -> None:
    """Trains with launch/local.py from shards, a run folder per seed."""
    for seed in arguments.seeds:
        train(arguments, "all", f"ours-seed{seed}", seed)


def published(arguments: argparse.Namespace) -> None:
    """Trains the published code's model with its pipeline and loop from files, a file of metrics per seed."""
    for seed in arguments.seeds:
        recipe = load_recipe(arguments.arch, arguments.overrides, train__seed=seed)
        folder = arguments.work / f"published-{arguments.filter}-seed{seed}"
        if (folder / "metrics.jsonl").exists():
            print(f"{folder / 'metrics.jsonl'} is there")
            continue
        began, images = time.monotonic(), arguments.work / "images" / "all"
        rows = list(train_epochs(recipe, images, arguments.reference, arguments.filter, f"{folder.name}: "))
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        (folder / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
        print(f"{folder.name}: {time.monotonic() - began:.0f} s", flush=True)


def finetune(arguments: argparse.Namespace) -> None:
    """Trains on five classes; then, briefly, on the other five from that checkpoint, and from scratch."""
    train(arguments, "first", "first-five", seed=0)
    for seed in arguments.seeds:
        train(arguments, "last", f"scratch-seed{seed}", seed, short=True)
        train(arguments, "last", f"tuned-seed{seed}", seed, short=True, start="first-five")


def report(arguments: argparse.Namespace) -> None:
    """Prints the tables of what has been run, and draws the figure."""
    result = cifar10_report.collect(arguments.work)
    cifar10_report.print_tables(result)
    if arguments.figure:
        cifar10_report.draw(result, arguments.figure)
    measuring.write_json(arguments.json, result)


def compare(recipe: Recipe, reference: Path, steps: int, device: torch.device) -> dict[str, Any]:
    """Returns the largest differences from the published code: of losses, and of logits on all test images.

    Ours is the model under training.engine with ZeRO-2, our schedule and our normalisation of uint8 batches. The
    batches are those of our loader. The control is the published code itself from weights that are changed in their
    last bit: what rounding alone does. Raises RecipeError as seeded_loop does.
    """
    from crate_dist.training.engine import Engine

    train_index, val_index = open_splits(recipe)
    assert val_index is not None
    batch, side, workers = recipe.train.global_batch, recipe.model.image_size, recipe.data.workers or 0
    schedule = Schedule(recipe.train.epochs, recipe.order.repeats * train_index.num_samples, batch)
    order = training_order(train_index.shard_sizes, recipe)
    transform = train_transform(recipe.augment, recipe.images, side)
    batches = TrainLoader(train_index, order, Share(0, 1, batch, batch), transform, workers)
    as_tested = eval_transform(recipe.images, side)
    tests = [found.images for found in eval_loader(val_index, 0, 1, as_tested, batch, workers)]
    classes = train_index.num_classes
    published, control = (seeded_loop(recipe, classes, reference) for _ in range(2))
    perturb(control.model)
    engine = Engine(build_model(recipe.model, classes, recipe.train.seed), recipe, device, batch, 1)
    theirs = Normalise(recipe.images).batch

    def on_tests() -> dict[str, Any]:
        base, changed = (torch.cat([loop.logits(theirs(images)) for images in tests]) for loop in (published, control))
        mine = torch.cat([engine.predict(images) for images in tests])
        return {"ours": apart(mine, base), "control": apart(changed, base)}

    result: dict[str, Any] = {"images": sum(map(len, tests)), "steps": steps, "before": on_tests()}
    losses = []
    for step in tqdm(range(steps), unit="step"):
        found = next(batches)
        images, labels = theirs(found.images), found.labels.clone()
        lr = learning_rate(step, recipe.optim, schedule)
        mine = engine.step(iter([(found.images, found.labels)]), lr, step).loss.item()
        losses.append((mine, published.step(images, labels).item(), control.step(images, labels).item()))
        if schedule.epochs_completed(step + 1) > schedule.epochs_completed(step):
            for loop in (published, control):
                loop.scheduler.step()
    result["losses"] = {
        name: {str(n): max(abs(row[place] - row[1]) for row in losses[:n]) for n in (*MARKS, steps) if n <= steps}
        for place, name in ((0, "ours"), (2, "control"))
    }
    result["after"] = on_tests()
    return result


@torch.no_grad()
def perturb(model: torch.nn.Module) -> None:
    """Changes every weight by one or no step of fp32, at random."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        ulp = torch.nextafter(weight, torch.full_like(weight, torch.inf)) - weight
        weight.add_(ulp * torch.randint(-1, 2, weight.shape, generator=generator))


def apart(logits: torch.Tensor, base: torch.Tensor) -> dict[str, float]:
    """Returns how far two outcomes for the same images are from each other."""
    agree = (logits.argmax(1) == base.argmax(1)).double().mean()
    return {"logits": float((logits - base).abs().max()), "same_percent": 100 * float(agree)}


def train(
    arguments: argparse.Namespace, shards: str, name: str, seed: int, short: bool = False, start: str | None = None
) -> None:
    """Makes a run of ours in WORK/name, unless it is complete. start: the run whose weights it begins with."""
    data, folder = arguments.work / "shards" / shards, arguments.work / name
    if (folder / "model-last.pt").exists():
        print(f"{folder} is complete")
        return
    options = ["--data", data, "--run-dir", folder, "--seed", seed, "--ranks", 1]
    options += ["--init-from", arguments.work / start] if start else []
    settings = [part for text in (SHORT if short else []) + arguments.overrides for part in ("--set", text)]
    run("launch/local.py", "--arch", arguments.arch, *options, *settings)


def run(program: str, *options: object) -> None:
    """Runs one of the project's programs, and shows its command. Raises CalledProcessError."""
    line = [program, *map(str, options)]
    print(f"$ python {shlex.join(line)}", flush=True)
    search = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(REPO / program), *line[1:]]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": search})


if __name__ == "__main__":
    sys.exit(main())
