"""Describes and converts files of weights.

    python -m crate_dist.models.weights describe model-best.pt
    python -m crate_dist.models.weights convert model-best.pt crate_b.pth.tar --to reference

A file is an export of crate-dist's, safetensors, a checkpoint of the published code (.pth.tar, with or without
"module."), a bare state dict, or a .npz of CRATE-α's JAX code. Nothing in it is executed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from crate_dist.arguments import Parser, positive
from crate_dist.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command: describe or convert a file of weights."""
    parser = Parser(
        prog="python -m crate_dist.models.weights",
        description=__doc__,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="describe | convert")
    show = commands.add_parser("describe", help="print what a file holds")
    show.add_argument("file", metavar="FILE", type=Path)
    show.add_argument("--classes", action="store_true", help="list all classes, in the order of the logits")
    change = commands.add_parser("convert", help="write the weights of a file in another format, with a model card")
    change.add_argument("source", metavar="IN", type=Path)
    change.add_argument("target", metavar="OUT", type=Path)
    formats = ["crate-dist", "reference", "safetensors"]
    change.add_argument("--to", required=True, choices=formats, help="format of OUT")
    change.add_argument("--bare-names", action="store_true", help='reference: no "module." before the names')
    change.add_argument(
        "--weights", choices=["raw", "ema"], help="which of IN, where their moving average (ema) stands beside them"
    )
    change.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="what IN does not say, and OUT will: images.mean=0.5,0.5,0.5 and all else of [images]; "
        "model.head=mean_patches",
    )
    change.add_argument("--force", action="store_true", help="replace OUT and its card if they exist")
    for command in (show, change):
        command.add_argument("--heads", type=positive, metavar="N", help="for unpublished sizes: IN may not say it")
    given = parser.parse_args(arguments)
    from crate_dist.models.weights.files import convert, describe  # --help does not wait for torch

    try:
        if given.command == "describe":
            sys.stdout.write(describe(given.file, given.heads, given.classes) + "\n")
            return
        said = given.heads, given.bare_names, given.force, given.weights, given.settings
        config = convert(given.source, given.target, given.to, *said)
        sys.stdout.write(describe(given.target, config.heads) + "\n")
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
