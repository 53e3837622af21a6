"""The command lines of evaluate.py and probe.py, which are there before torch is imported."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import get_args

from crate_dist.arguments import Parser, positive, whole_number
from crate_dist.config import DATA_VARIABLE, ResizeFilter
from crate_dist.locations import location

KS = (10, 20, 100, 200)
"""Numbers of neighbours."""
TEMPERATURE = 0.07
"""Of their votes."""
L2 = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""What the linear probe chooses from."""
MAX_STEPS = 500
"""Of each of its fits."""
_SMALLEST_CROP = 0.05
"""Below it, images would be resized to more than 20 times what the model reads, and fill memory."""

_KNN = """Weighted nearest neighbours on frozen features, as DINO reports them (arXiv 2104.14294): each of the k
training samples most similar to a query votes for its class with weight exp(similarity / T)."""
_LINEAR = """Multinomial logistic regression on frozen, standardised features, fitted to its optimum: neither learning
rate nor batch has a say in the result. l2 is chosen on a tenth of the training split that is held out for it."""


def evaluate_parser(description: str | None) -> Parser:
    """Returns the parser of `python -m crate_dist.evaluate`."""
    parser = Parser(prog="python -m crate_dist.evaluate", description=description)
    _add_common(parser)
    parser.add_argument("--split", default="val", metavar="NAME", help="folder in DIR [%(default)s]")
    parser.add_argument(
        "--also",
        type=location,
        nargs="+",
        default=[],
        metavar="DIR",
        help="more data sets, for one table with --data: shards, or class folders as ImageNet-V2, -A, -R, -Sketch and "
        "-C have them",
    )
    parser.add_argument(
        "--real", type=Path, metavar="FILE", help="real.json: the accuracy on ImageNet's ReaL labels, too"
    )
    parser.add_argument(
        "--all-classes", action="store_true", help="where the data have fewer classes, let all of the model's compete"
    )
    parser.add_argument(
        "--crop",
        type=_share,
        metavar="X",
        help="resize the short side to the model's / X and take the middle: 0.875 is the usual 256 and 224, 1.0 what "
        "ToST's --full_crop does [as its run did, or as its published code does]",
    )
    parser.add_argument(
        "--resize-filter", choices=get_args(ResizeFilter), help="of those resizes [as its run, or published code]"
    )
    parser.add_argument(
        "--max-bad-fraction", type=float, metavar="X", help="of the samples may be unreadable [as in training]"
    )
    parser.add_argument(
        "--throughput", action="store_true", help="also time the model alone, with and without torch.compile"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be evaluated, and evaluate nothing")
    shown = parser.add_argument_group("more of what is found on --data")
    shown.add_argument("--per-class", action="store_true", help="print a line for every class, the worst first")
    shown.add_argument("--worst", type=positive, metavar="N", help="print those of the N worst classes alone")
    shown.add_argument("--confusions", type=positive, metavar="N", help="print the N most frequent confusions")
    shown.add_argument("--reliability", action="store_true", help="print accuracy by confidence, for the calibration")
    shown.add_argument("--csv", type=Path, metavar="FILE", help="write the table of classes there")
    return parser


def probe_parser(description: str | None) -> Parser:
    """Returns the parser of `python -m crate_dist.probe`."""
    parser = Parser(prog="python -m crate_dist.probe", description=description)
    commands = parser.add_subparsers(dest="probe", required=True)
    near = commands.add_parser("knn", help="weighted nearest neighbours", description=_KNN)
    linear = commands.add_parser("linear", help="a linear classifier", description=_LINEAR)
    for command in (near, linear):
        _add_common(command)
        command.add_argument("--train-split", default="train", metavar="NAME", help="folder in DIR [%(default)s]")
        command.add_argument("--split", default="val", metavar="NAME", help="folder in DIR [%(default)s]")
        command.add_argument("--layer", type=int, metavar="N", help="whose tokens, counted from 1; -1: the last [-1]")
        command.add_argument("--pool", choices=["cls", "mean"], help="the feature of an image [as the model's head]")
    near.add_argument(
        "--k", type=positive, nargs="+", default=list(KS), metavar="N", help="neighbours, or all [10 20 100 200]"
    )
    near.add_argument(
        "--temperature", type=_above_zero, default=TEMPERATURE, metavar="T", help="of their votes [%(default)s]"
    )
    linear.add_argument(
        "--l2",
        type=_above_zero,
        nargs="+",
        default=list(L2),
        metavar="X",
        help="to choose from, on a tenth of the training split [1e-1 1e-2 … 1e-6]",
    )
    linear.add_argument(
        "--seed", type=whole_number(0), default=0, help="of the samples held out for that [%(default)s]"
    )
    linear.add_argument("--max-steps", type=positive, default=MAX_STEPS, metavar="N", help="of each fit [%(default)s]")
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    """Adds the model and --data, --heads, --batch, --workers, --precision, --json."""
    parser.add_argument("model", type=Path, metavar="RUN|CHECKPOINT|WEIGHTS", help="what is to be measured")
    parser.add_argument(
        "--data", type=location, metavar="DIR", help=f"folder or URL of the shards [the run's, then ${DATA_VARIABLE}]"
    )
    parser.add_argument(
        "--batch", type=positive, default=64, metavar="N", help="images at a time on each rank [%(default)s]"
    )
    parser.add_argument(
        "--workers", type=whole_number(0), default=2, metavar="N", help="loader processes per rank [%(default)s]"
    )
    parser.add_argument("--heads", type=positive, metavar="N", help="of the model, where its file does not tell")
    parser.add_argument(
        "--weights", choices=["raw", "ema"], help="of a run or checkpoint: ema, their moving average in training [raw]"
    )
    parser.add_argument("--precision", choices=["fp32", "autocast", "bf16"], help="of the products [as in training]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured there")


def _share(text: str) -> float:
    if not _SMALLEST_CROP <= (number := _number(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share of the short side, from {_SMALLEST_CROP} to 1")
    return number


def _above_zero(text: str) -> float:
    if not 0 < (number := _number(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return number


def _number(text: str) -> float:
    """Returns NaN, which is within no bounds, for what is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan
