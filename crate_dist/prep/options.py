"""The options that the programs of data_prep which write shards share."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from crate_dist.arguments import positive, whole_number
from crate_dist.data.index import ShardError
from crate_dist.prep.folders import ListOptions
from crate_dist.prep.images import ImageOptions
from crate_dist.prep.program import program_parser, proper_fraction
from crate_dist.prep.shards import WHOLE, Part

_CONTINUES = """
An interrupted conversion continues when the same command is given again. The same images, seed and options give the
same bytes, at any number of workers.
"""


@dataclass(frozen=True)
class Options:
    """The options of a conversion, called as on the command line. program: the one that converts, for the record"""

    program: str
    source: Path
    out: Path
    workers: int
    seed: int
    shard_samples: int
    image_options: ImageOptions
    list_options: ListOptions
    dry_run: bool
    part: Part = WHOLE


def conversion_parser(description: str | None, epilog: str) -> argparse.ArgumentParser:
    """Returns a parser with --source, --out and all options of a conversion."""
    parser = program_parser(description, epilog + _CONTINUES)
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help="folder that the images are in")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the shards: DIR/train/, DIR/val/"
    )
    seed = whole_number(0, 2**63 - 1)
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the one global shuffle [0]")
    parser.add_argument("--shard-samples", type=positive, default=1000, metavar="N", help="images per shard [1000]")
    parser.add_argument(
        "--short-side", type=positive, metavar="N", help="resize larger images so that their short side has N pixels"
    )
    parser.add_argument(
        "--quality", type=whole_number(1, 100), metavar="Q", help="re-encode every image as JPEG of quality Q; without "
        "it only images that are resized or no plain JPEG are, with 95"
    )  # fmt: skip
    parser.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be used, and list them")
    parser.add_argument("--verify-images", action="store_true", help="decode every image, also those that stay as is")
    parser.add_argument("--follow-links", action="store_true", help="follow links that lead out of the source")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    return parser


def add_part(parser: argparse.ArgumentParser) -> None:
    """Adds --part, for sources that many machines can read."""
    parser.add_argument(
        "--part",
        type=Part.parse,
        default=WHOLE,
        metavar="I/N",
        help="write the I-th of N shares of the shards, on one of N machines with the same --source and --out; who "
        "finishes last checks all shards and writes the index [1/1]; launch/prep.py starts them on a SLURM cluster",
    )


def add_val_fraction(parser: argparse.ArgumentParser, note: str) -> None:
    """Adds --val-fraction. note: what else there is to know of it"""
    parser.add_argument(
        "--val-fraction",
        type=proper_fraction,
        default=0.0,
        metavar="F",
        help=f"share of every class that is held out of the training images as val; {note}",
    )


def parsed(
    parser: argparse.ArgumentParser, lossless: bool = False, archive: bool = False
) -> tuple[argparse.Namespace, Options]:
    """Returns what the user typed, as it is and as the options of a conversion.

    lossless: as in ImageOptions; archive: the source may be a file. Raises ShardError when the folders cannot be meant.
    """
    arguments = parser.parse_args()
    source, out = arguments.source.expanduser().absolute(), arguments.out.expanduser().absolute()
    if not source.is_dir() and not (archive and source.is_file()):
        what = "is not a folder" if source.exists() else "does not exist"
        raise ShardError(f"--source {source} {what}; give the folder that the images are in")
    real_source, real_out = source.resolve(), out.resolve()
    if real_out == real_source or real_source in real_out.parents:
        raise ShardError(f"--out {out} lies in the source {source}; give a folder beside it")
    return arguments, Options(
        f"data_prep/{parser.prog}",
        source,
        out,
        arguments.workers,
        arguments.seed,
        arguments.shard_samples,
        ImageOptions(arguments.short_side, arguments.quality, arguments.verify_images, lossless),
        ListOptions(arguments.follow_links, arguments.skip_bad),
        arguments.dry_run,
        getattr(arguments, "part", WHOLE),
    )
