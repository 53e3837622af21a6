"""Draws the figures of CRATE's papers, of any trained model and any pictures, and several runs beside each other.

    python -m crate_dist.figures attention runs/crate_base --images photos
    python -m crate_dist.figures layers    runs/crate_base --data /data/imagenet-shards
    python -m crate_dist.figures pca       model-best.pt --images a.jpg b.jpg c.jpg
    python -m crate_dist.figures mask      model-best.pt --images photos --masks truth
    python -m crate_dist.figures compare   runs/crate_small runs/crate_base --format pdf --title none

Each writes its figure into --out, for a page of text 6.3 inches wide, and the numbers in it as .npz beside.
Pictures are read whole, with the short side of the size that the model was trained at or of --size, on a grid of
patches of their own proportions, for which the positions are interpolated, and shown at their own resolution; `layers`
reads the centre, as evaluation.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from crate_dist.arguments import Parser, positive, whole_number
from crate_dist.config import DATA_VARIABLE
from crate_dist.errors import UserError
from crate_dist.locations import location

_COMMAND = "python -m crate_dist.figures"
_FORMATS = ("png", "pdf", "svg")


def _parser() -> Parser:
    parser = Parser(prog=_COMMAND, description=__doc__)
    commands = parser.add_subparsers(dest="figure", required=True, metavar="attention | layers | pca | mask | compare")
    page = Parser(add_help=False)
    page.add_argument("--out", type=Path, default=Path("figures"), metavar="DIR", help="folder [%(default)s]")
    page.add_argument(
        "--format",
        nargs="+",
        choices=_FORMATS,
        default=["png"],
        help="png, and pdf or svg with lines and letters for print [png]",
    )
    page.add_argument(
        "--dpi",
        type=whole_number(30, 1200),
        default=300,
        metavar="N",
        help="dots per inch of png, and of photos and maps in the others [%(default)s]",
    )
    page.add_argument("--width", type=_inches, default=6.3, metavar="INCHES", help="at most [%(default)s]")
    page.add_argument("--title", metavar="TEXT", help="above each figure; none: nothing [what it shows]")
    common = Parser(add_help=False)
    common.add_argument("model", type=Path, metavar="RUN|CHECKPOINT|WEIGHTS", help="whose figure it is")
    source = common.add_mutually_exclusive_group()
    source.add_argument("--images", type=Path, nargs="+", metavar="PATH", help="files and folders; .pt: tensors")
    source.add_argument(
        "--data", type=location, metavar="DIR", help=f"or folder or URL of shards [the run's, then ${DATA_VARIABLE}]"
    )
    common.add_argument("--split", default="val", help="folder in it [%(default)s]")
    common.add_argument("--count", type=positive, metavar="N", help="the first N pictures [layers: 64, others: 4]")
    common.add_argument("--heads", type=positive, metavar="N", help="of the model, where its file does not tell")
    common.add_argument(
        "--weights", choices=["raw", "ema"], help="of a run or checkpoint: ema, their moving average in training [raw]"
    )
    common.add_argument("--size", type=positive, metavar="PIXELS", help="short side [as the model was trained]")
    layered = Parser(add_help=False)
    layered.add_argument("--layer", type=int, metavar="N", help="counted from 1; -1: the last [-1]")

    def add(name: str, example: str, shows: str, *parents: Parser) -> argparse.ArgumentParser:
        text = f"    {_COMMAND} {name} {example}\n\nShows {shows}."
        return commands.add_parser(name, parents=[*parents, page], help=shows, description=text)

    add("attention", "runs/crate_base --images photos", "where the class token looks", common, layered)
    add(
        "layers",
        "runs/crate_base --count 256 --format pdf",
        "coding rate, sparsity and all other measures of every layer",
        common,
    )
    pca = add("pca", "model-best.pt --images photos", "patches in the colours of their components", common, layered)
    pca.add_argument("--threshold", type=float, default=0.5, metavar="T", help="of the first component [%(default)s]")
    pca.add_argument("--invert", action="store_true", help="the foreground is the other side")
    pca.add_argument(
        "--scale",
        choices=["all", "each"],
        default="all",
        help="all: a colour means the same in all pictures; each: scaled in each, as published [%(default)s]",
    )
    mask = add(
        "mask", "model-best.pt --images photos", "foreground by attention and by normalised cut", common, layered
    )
    mask.add_argument("--mass", type=float, default=0.6, metavar="M", help="share of the attention [%(default)s]")
    mask.add_argument("--tau", type=float, default=0.15, metavar="T", help="cosine that joins patches [%(default)s]")
    mask.add_argument("--objects", type=positive, default=3, metavar="N", help="cut out at most [%(default)s]")
    mask.add_argument("--masks", type=Path, metavar="DIR", help="the truth: images of the same names, not 0 inside")
    compare = add("compare", "runs/crate_small runs/crate_base", "curves and layer profiles of several runs in one")
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders; what they have measured")
    compare.add_argument("--names", nargs="+", metavar="NAME", help="what the runs are called [their folders]")
    compare.add_argument(
        "--measures",
        nargs="+",
        metavar="NAME",
        help="of the layers, as in metrics.jsonl; all: every one [coding_rate token_coding_rate zeros]",
    )
    return parser


def _inches(text: str) -> float:
    try:
        width = float(text)
    except ValueError:
        width = 0.0
    if not 2 <= width <= 30:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a width from 2 to 30 inches, for instance 3.25")
    return width


def main(argv: list[str] | None = None) -> int:
    """Draws one figure, as the command line says, and names the files written."""
    options = _parser().parse_args(argv)
    try:
        if options.out.exists() and not options.out.is_dir():
            raise UserError(f"--out {options.out} is a file; give a folder, which is made where there is none")
        from crate_dist.figures.sheet import Sheet  # --help waits for neither matplotlib nor torch

        title = "" if options.title == "none" else options.title
        sheet = Sheet(options.out, tuple(dict.fromkeys(options.format)), options.dpi, options.width, title)
        if options.figure == "compare":
            from crate_dist.figures.compare import MEASURES, draw_comparison

            said, written = draw_comparison(options.runs, options.names, sheet, options.measures or MEASURES)
        else:
            from crate_dist.figures.draw import draw

            said, written = draw(options, sheet)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    print(f"{said}:", *written, sep="\n  ")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
