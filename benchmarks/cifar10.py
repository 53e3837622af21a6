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
from collections.abc import Callable, Sequence
from pathlib import Path

import measuring  # isort: skip
import cifar10_equal
import cifar10_report
from published import FILTERS, train_epochs

from crate_dist.config import RecipeError, load_recipe

REPO = Path(__file__).resolve().parents[1]
HALVES = {"first": slice(0, 5), "last": slice(5, 10)}
"""Class folders in sorted order: disjoint classes, hence disjoint images."""
SHORT = ["train.epochs=2", "optim.warmup_epochs=1"]
"""The small budget that both contestants of `finetune` have."""


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(required=True, metavar="STEP")
    recipe, json_file = measuring.recipe_options("cifar10_small"), measuring.json_option()
    reference, seeds = (argparse.ArgumentParser(add_help=False) for _ in range(2))
    reference.add_argument("--reference", type=Path, required=True, metavar="PATH", help="the published code")
    seeds.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="[0 1 2]")

    def add(step: Callable[[argparse.Namespace], None], *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        summary = (step.__doc__ or "").partition("\n")[0]
        sub = steps.add_parser(step.__name__, help=summary, description=summary, parents=parents)
        sub.set_defaults(run=step)
        sub.add_argument("--work", type=Path, default=Path("runs/cifar10"), metavar="DIR", help="[%(default)s]")
        return sub

    add(prepare, recipe).add_argument(
        "--source", type=Path, required=True, metavar="DIR", help="class folders of JPEGs"
    )
    add(equal, recipe, json_file, reference).add_argument(
        "--steps", type=int, default=500, metavar="N", help="[%(default)s]"
    )
    add(ours, recipe, seeds)
    add(published, recipe, reference, seeds).add_argument(
        "--filter", choices=list(FILTERS), default="bilinear", help="of its resize [its own: %(default)s]"
    )
    add(finetune, recipe, seeds)
    add(report, json_file).add_argument("--figure", type=Path, metavar="FILE", help="draw the curves here")
    return parser.parse_args()


def prepare(arguments: argparse.Namespace) -> None:
    """Copies the images to WORK/images, and converts them to shards: all ten classes, the first and the last five."""
    source, images = arguments.source, arguments.work / "images"
    classes = sorted(folder.name for folder in (source / "train").iterdir() if folder.is_dir())
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
    result = cifar10_equal.compare(recipe, arguments.reference, arguments.steps)
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
        metrics, beside = folder / "metrics.jsonl", folder / "metrics.jsonl.tmp"
        folder.mkdir(parents=True, exist_ok=True)
        if metrics.exists():
            print(f"{metrics} is there")
            continue
        began, images = time.monotonic(), arguments.work / "images" / "all"
        with beside.open("w", encoding="utf-8") as file:
            for row in train_epochs(recipe, images, arguments.reference, arguments.filter, f"{folder.name}: "):
                file.write(json.dumps(row) + "\n")
        beside.replace(metrics)
        (folder / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
        print(f"{folder.name}: {time.monotonic() - began:.0f} s", flush=True)


def finetune(arguments: argparse.Namespace) -> None:
    """Trains on five classes; then, briefly, on the other five from that checkpoint, and from scratch."""
    train(arguments, "first", "first-five", seed=0)
    for seed in arguments.seeds:
        train(arguments, "last", f"scratch-seed{seed}", seed, overrides=SHORT)
        start = ["--init-from", arguments.work / "first-five"]
        train(arguments, "last", f"tuned-seed{seed}", seed, overrides=SHORT, options=start)


def report(arguments: argparse.Namespace) -> None:
    """Prints the tables of what has been run, and draws the figure."""
    result = cifar10_report.collect(arguments.work)
    cifar10_report.print_tables(result)
    if arguments.figure:
        cifar10_report.draw(result, arguments.figure)
    measuring.write_json(arguments.json, result)


def train(
    arguments: argparse.Namespace,
    shards: str,
    name: str,
    seed: int,
    overrides: Sequence[str] = (),
    options: Sequence[object] = (),
) -> None:
    """Makes a run of ours in WORK/name, unless it is complete."""
    data, folder = arguments.work / "shards" / shards, arguments.work / name
    if (folder / "model-last.pt").exists():
        print(f"{folder} is complete")
        return
    settings = [part for text in [*overrides, *arguments.overrides] for part in ("--set", text)]
    where = ["--data", data, "--run-dir", folder, "--seed", seed, "--ranks", 1]
    run("launch/local.py", "--arch", arguments.arch, *where, *options, *settings)


def run(program: str, *options: object) -> None:
    """Runs one of the project's programs, and shows its command. Raises CalledProcessError."""
    line = [program, *map(str, options)]
    print(f"$ python {shlex.join(line)}", flush=True)
    search = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(REPO / program), *line[1:]]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": search})


if __name__ == "__main__":
    sys.exit(main())
