"""Weights in and out: our model-only export, and every checkpoint that the published code writes.

Read:   crate-dist's export                {"format", "model", "state_dict", "meta"}
        the published training code's      {"epoch", "arch", "state_dict", "best_acc1", …}
        its fine-tuning code's             {"model": state_dict, …}
        a bare state dict; each with or without the "module." of DataParallel and DistributedDataParallel
Written: the first two, whole or not at all. Files are opened with weights_only=True, so that no code in them runs.

    python -m crate_dist.models.weights describe FILE
    python -m crate_dist.models.weights convert IN OUT --to reference
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crate_dist.models.archs import find_arch
from crate_dist.models.crate import CRATE, CrateConfig
from crate_dist.models.layout import (
    StateDict,
    WeightsError,
    check_fit,
    from_reference,
    infer_config,
    load_weights,
    to_reference,
)

FORMAT = "crate-dist/1"

__all__ = [
    "FORMAT",
    "StateDict",
    "Weights",
    "WeightsError",
    "check_fit",
    "describe",
    "export_model",
    "export_reference",
    "from_reference",
    "infer_config",
    "load_model",
    "load_weights",
    "read_state_dict",
    "read_weights",
    "to_reference",
]


@dataclass(frozen=True)
class Weights:
    """What one file of weights holds.

    kind: "crate-dist", "reference", "reference fine-tuning" or "state dict"
    state_dict: tensors on the CPU under crate-dist's names, in the dtype of the file
    config: the architecture, where the file says it; meta: plain values that came along
    """

    kind: str
    state_dict: dict[str, Tensor]
    config: CrateConfig | None
    meta: dict[str, Any]


def read_weights(path: str | Path) -> Weights:
    """Reads a file of any of the kinds above.

    Raises WeightsError when there is no such file, when it is damaged or no checkpoint, or holds no tensors.
    """
    path = Path(path)
    content = _load(path)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, no checkpoint and no state dict")
    if "format" in content:
        return _read_export(path, content)
    for key, kind in (
        ("state_dict", "reference"),
        ("model", "reference fine-tuning"),
        ("net", "reference fine-tuning"),
    ):
        if isinstance(content.get(key), Mapping):
            state = _tensors(path, content[key])
            plain = {name: _plain(value) for name, value in content.items() if name in ("epoch", "arch", "best_acc1")}
            return Weights(kind, from_reference(state), None, plain)
    return Weights("state dict", from_reference(_tensors(path, content)), None, {})


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file of any kind, on the CPU, under crate-dist's names. Raises as read_weights does."""
    return read_weights(path).state_dict


def load_model(path: str | Path, heads: int | None = None) -> tuple[CRATE, dict[str, Any]]:
    """(model, meta) from a file of any kind; the model is on the CPU, in training mode, in the dtype of the file.

    heads: for weights of a size that was not published, in files that do not say it
    Raises WeightsError when the file or its weights cannot be used.
    """
    weights = read_weights(path)
    try:
        config = weights.config or infer_config(weights.state_dict, heads)
        check_fit(weights.state_dict, config)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    with torch.device("meta"):
        model = CRATE(config)
    model.load_state_dict(weights.state_dict, assign=True)
    return model, weights.meta


def export_model(
    path: str | Path, config: CrateConfig, state_dict: StateDict, meta: Mapping[str, Any] | None = None
) -> None:
    """Writes weights alone, such that load_model and torch.load(weights_only=True) read them.

    state_dict: model.state_dict(), or fp32 master weights under the same names; views are cut from their storage
    meta: plain values that JSON can say, such as the step and the accuracy
    Raises WeightsError when the weights do not fit `config`, TypeError when `meta` is not plain, OSError.
    """
    check_fit(state_dict, config)
    content = {
        "format": FORMAT,
        "model": {"arch": find_arch(config), **dataclasses.asdict(config)},
        "state_dict": _compact(state_dict),
        "meta": json.loads(json.dumps(dict(meta or {}))),
    }
    _save_whole(content, Path(path))


def export_reference(
    path: str | Path,
    config: CrateConfig,
    state_dict: StateDict,
    meta: Mapping[str, Any] | None = None,
    prefix: str = "module.",
) -> None:
    """Writes what the published code's training script writes, without optimizer and scheduler.

    meta: "epoch", "arch" and "best_acc1" are taken from it where they are given
    prefix: "module." as the published code expects it, whose models are always wrapped; "" for the bare class
    Raises WeightsError when the weights do not fit `config`, OSError.
    """
    check_fit(state_dict, config)
    meta = meta or {}
    arch = find_arch(config)
    content = {
        "epoch": int(meta.get("epoch", 0)),
        "arch": arch.replace("crate", "CRATE") if arch else str(meta.get("arch", "CRATE")),
        "state_dict": to_reference(_compact(state_dict), prefix),
        "best_acc1": torch.tensor(float(meta.get("best_acc1", 0.0))),
    }
    _save_whole(content, Path(path))


def _load(path: Path) -> Any:
    if path.is_dir():
        raise WeightsError(f"{path} is a folder; give a file of weights in it")
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"  # older files are bare pickles
            if is_zip and (record := zipfile.ZipFile(file).testzip()):  # torch.load looks at no checksum
                raise WeightsError(f"{path} is damaged: the checksum of {record} in it is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    except zipfile.BadZipFile as error:
        raise WeightsError(f"{path} is truncated or damaged") from error
    except Exception as error:  # what a pickle of anything else raises is anyone's guess
        if "nsupported global" in str(error) or "nsupported class" in str(error):
            raise WeightsError(
                f"{path} holds Python objects beside its tensors, which are not opened because they could run code; "
                "save its state_dict alone"
            ) from error
        raise WeightsError(f"{path} is no PyTorch checkpoint, or a damaged one") from error


def _read_export(path: Path, content: Mapping[str, Any]) -> Weights:
    if content["format"] != FORMAT:
        raise WeightsError(f"{path} has the format {content['format']!r}; this version reads {FORMAT!r}")
    try:
        fields = {key: value for key, value in content["model"].items() if key != "arch"}
        config = CrateConfig(**fields)
        state_dict, meta = _tensors(path, content["state_dict"]), dict(content["meta"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path} is no whole {FORMAT} export: {error}") from error
    return Weights("crate-dist", state_dict, config, meta)


def _tensors(path: Path, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    strange = [str(key) for key, value in state_dict.items() if not isinstance(value, Tensor)]
    if strange or not state_dict:
        found = f"holds {', '.join(strange[:4])}" if strange else "is empty"
        raise WeightsError(f"{path}: expected a state dict, names and tensors, but it {found}")
    return dict(state_dict)


def _compact(state_dict: StateDict) -> dict[str, Tensor]:
    """On the CPU and each in a storage of its own: torch.save writes the whole buffer that a view looks into."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in state_dict.items()
    }


def _save_whole(content: Any, path: Path) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        error.filename = str(path)  # a full disk has no name of its own
        raise
    finally:
        beside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, survives a power cut
    finally:
        os.close(folder)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def describe(path: str | Path, heads: int | None = None) -> str:
    """A few lines on what a file of weights holds. Raises WeightsError when it cannot be read."""
    weights = read_weights(path)
    tensors = weights.state_dict.values()
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    lines = {"file": str(path), "kind": weights.kind}
    try:
        config = weights.config or infer_config(weights.state_dict, heads)
        check_fit(weights.state_dict, config)
        lines["arch"] = find_arch(config) or "no published size"
        lines |= {field.name: str(getattr(config, field.name)) for field in dataclasses.fields(config)}
    except WeightsError as error:
        lines["model"] = f"unknown: {error}"
    lines["tensors"] = f"{len(tensors)}, {', '.join(dtypes)}"
    lines["parameters"] = f"{sum(tensor.numel() for tensor in tensors):,}"
    lines |= {f"meta.{key}": str(value) for key, value in weights.meta.items()}
    return "\n".join(f"{key:<16}{value}" for key, value in lines.items())


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: describe or convert a file of weights."""
    parser = argparse.ArgumentParser(
        prog="python -m crate_dist.models.weights",
        description="Describe and convert weights of CRATE: crate-dist's exports, the published code's checkpoints "
        "(.pth.tar, with or without 'module.'), and bare state dicts. Nothing in a file is executed.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="describe | convert")
    show = commands.add_parser("describe", help="print what a file holds")
    show.add_argument("file", metavar="FILE", type=Path)
    convert = commands.add_parser("convert", help="write the weights of a file in another layout")
    convert.add_argument("source", metavar="IN", type=Path)
    convert.add_argument("target", metavar="OUT", type=Path)
    convert.add_argument("--to", required=True, choices=["reference", "crate-dist"], help="layout of OUT")
    convert.add_argument("--bare-names", action="store_true", help='reference: no "module." before the names')
    convert.add_argument("--force", action="store_true", help="replace OUT if it exists")
    for command in (show, convert):
        command.add_argument("--heads", type=int, metavar="N", help="for unpublished sizes: IN may not say it")
    options = parser.parse_args(arguments)
    try:
        if options.command == "describe":
            sys.stdout.write(describe(options.file, options.heads) + "\n")
            return
        if options.target.exists() and not options.force:
            raise WeightsError(f"{options.target} exists; --force replaces it")
        model, meta = load_model(options.source, options.heads)
        if options.to == "crate-dist":
            export_model(options.target, model.config, model.state_dict(), meta)
        else:
            prefix = "" if options.bare_names else "module."
            export_reference(options.target, model.config, model.state_dict(), meta, prefix)
        sys.stdout.write(describe(options.target, model.config.heads) + "\n")
    except (WeightsError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
