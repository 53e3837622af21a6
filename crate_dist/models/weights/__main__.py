"""Describes and converts files of weights.

    python -m crate_dist.models.weights describe model-best.pt
    python -m crate_dist.models.weights convert model-best.pt crate_b.pth.tar --to reference

A file is an export of crate-dist's, safetensors, a checkpoint of the published code (.pth.tar, with or without
"module."), or a bare state dict. Nothing in it is executed.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from crate_dist.arguments import Parser, positive
from crate_dist.errors import UserError
from crate_dist.models.build import find_arch
from crate_dist.models.crate import CrateConfig
from crate_dist.models.weights.card import card_path, write_card
from crate_dist.models.weights.names import WeightsError
from crate_dist.models.weights.read import load_model, read_weights
from crate_dist.models.weights.write import export_model, export_reference, export_safetensors


def describe(path: str | Path, heads: int | None = None) -> str:
    """Says in a few lines what a file of weights holds. Raises WeightsError when it cannot be read."""
    weights = read_weights(path)
    tensors = weights.state_dict.values()
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    lines = {"file": str(path), "kind": weights.kind}
    try:
        config, notes = weights.architecture(heads)
        lines |= {"note" if number == 0 else f"note {number + 1}": text for number, text in enumerate(notes)}
        lines["arch"] = find_arch(config) or "no published size"
        lines |= {field.name: str(getattr(config, field.name)) for field in dataclasses.fields(config)}
    except WeightsError as error:
        lines["model"] = f"unknown: {error}"
    lines["tensors"] = f"{len(tensors)}, {', '.join(dtypes)}"
    lines["parameters"] = f"{sum(tensor.numel() for tensor in tensors):,}"
    lines |= {f"meta.{key}": str(value) for key, value in weights.meta.items()}
    return "\n".join(f"{key:<15} {value}" for key, value in lines.items())


def convert(
    source: Path, target: Path, to: str, heads: int | None = None, bare_names: bool = False, force: bool = False
) -> CrateConfig:
    """Writes the weights of a file in another format, and a card beside them where none stands or `force` is set.

    Returns the architecture, which the file written need not say.

    to: "crate-dist", "reference" or "safetensors"; bare_names: no "module." in the published code's names
    Raises WeightsError when `source` cannot be used, or `target` exists and is not to be replaced; OSError.
    """
    if target.exists() and not force:
        raise WeightsError(f"{target} exists; --force replaces it")
    if not target.absolute().parent.is_dir():
        raise WeightsError(f"{target} cannot be written: there is no folder {target.absolute().parent}; make it first")
    model, meta = load_model(source, heads)
    if to == "reference":
        export_reference(target, model.config, model.state_dict(), meta, "" if bare_names else "module.")
    else:
        export = export_safetensors if to == "safetensors" else export_model
        export(target, model.config, model.state_dict(), meta)
    if force or not card_path(target).exists():
        write_card(target, model.config, meta)
    return model.config


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command: describe or convert a file of weights."""
    parser = Parser(
        prog="python -m crate_dist.models.weights",
        description=__doc__,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="describe | convert")
    show = commands.add_parser("describe", help="print what a file holds")
    show.add_argument("file", metavar="FILE", type=Path)
    change = commands.add_parser("convert", help="write the weights of a file in another format, with a model card")
    change.add_argument("source", metavar="IN", type=Path)
    change.add_argument("target", metavar="OUT", type=Path)
    formats = ["crate-dist", "reference", "safetensors"]
    change.add_argument("--to", required=True, choices=formats, help="format of OUT")
    change.add_argument("--bare-names", action="store_true", help='reference: no "module." before the names')
    change.add_argument("--force", action="store_true", help="replace OUT and its card if they exist")
    for command in (show, change):
        command.add_argument("--heads", type=positive, metavar="N", help="for unpublished sizes: IN may not say it")
    given = parser.parse_args(arguments)
    try:
        if given.command == "describe":
            sys.stdout.write(describe(given.file, given.heads) + "\n")
            return
        config = convert(given.source, given.target, given.to, given.heads, given.bare_names, given.force)
        sys.stdout.write(describe(given.target, config.heads) + "\n")
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
