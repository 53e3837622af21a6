"""Describes and converts files of weights.

    python -m crate_dist.models.weights describe model-best.pt
    python -m crate_dist.models.weights convert model-best.pt crate_b.pth.tar --to reference

A file is an export of crate-dist's, safetensors, a checkpoint of the published code (.pth.tar, with or without
"module."), or a bare state dict. Nothing in it is executed.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from crate_dist.arguments import Parser, positive
from crate_dist.errors import UserError
from crate_dist.models.build import find_arch
from crate_dist.models.crate import CrateConfig
from crate_dist.models.weights.card import card_path, write_card
from crate_dist.models.weights.names import WeightsError
from crate_dist.models.weights.read import load_model, read_weights
from crate_dist.models.weights.write import export_model, export_reference, export_safetensors

_FEW = 5


def describe(path: str | Path, heads: int | None = None, all_classes: bool = False) -> str:
    """Says as a table what a file of weights holds. Raises WeightsError when it cannot be read.

    all_classes: every one of them, a line each; else the first few
    """
    weights = read_weights(path)
    tensors = weights.state_dict.values()
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    lines: dict[str, Any] = {"file": str(path), "kind": weights.kind}
    try:
        config, notes = weights.architecture(heads)
        lines |= {"note" if number == 0 else f"note {number + 1}": text for number, text in enumerate(notes)}
        lines["arch"] = find_arch(config) or "no published size"
        lines |= dataclasses.asdict(config)
    except WeightsError as error:
        lines["model"] = f"unknown: {error}"
    lines["tensors"] = f"{len(tensors)}, {', '.join(dtypes)}"
    lines["parameters"] = f"{sum(tensor.numel() for tensor in tensors):,}"
    rows = [*_rows(lines), *_rows(weights.meta, all_classes)]
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"{key:<{width}}  {value}".rstrip() for key, value in rows)


def _rows(values: Mapping[Any, Any], all_classes: bool = False, indent: str = "") -> Iterator[tuple[str, str]]:
    """Yields key and text of each value, and below the key of a table those of its own."""
    for name, value in values.items():
        key = f"{indent}{_printable(name)}"
        if isinstance(value, Mapping) and value:
            yield key, ""
            yield from _rows(value, indent=f"{indent}  ")
        elif name == "classes" and not indent and isinstance(value, list | tuple) and len(value) > _FEW:
            yield key, f"{len(value):,}: " + ", ".join(map(_printable, value[:_FEW])) + ", … (--classes lists them)"
            if all_classes:
                yield from ((f"  {number}", _printable(each)) for number, each in enumerate(value))
        else:
            yield key, ", ".join(map(_printable, value)) if isinstance(value, list | tuple) else _printable(value)


def _printable(value: object) -> str:
    """Writes a value of a file that may be anybody's: what would move a terminal's cursor is left out."""
    text = "none" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return "".join(character for character in text if character.isprintable())


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
    show.add_argument("--classes", action="store_true", help="list all classes, in the order of the logits")
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
            sys.stdout.write(describe(given.file, given.heads, given.classes) + "\n")
            return
        config = convert(given.source, given.target, given.to, given.heads, given.bare_names, given.force)
        sys.stdout.write(describe(given.target, config.heads) + "\n")
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
