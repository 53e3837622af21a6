"""What a file of weights holds, as a table; and the same weights in a file of another kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from crate_dist.config import ImageSection, WeightsKind
from crate_dist.config.keys import parse_value
from crate_dist.config.parts import HEADS
from crate_dist.models.batch_norm import STATISTICS
from crate_dist.models.build import find_arch
from crate_dist.models.config import ModelConfig
from crate_dist.models.weights.card import card_path, write_card
from crate_dist.models.weights.names import WeightsError
from crate_dist.models.weights.read import load_model, read_weights
from crate_dist.models.weights.write import export_model, export_reference, export_safetensors

_FEW = 5
_SETTABLE = (*(f"images.{name}" for name in ImageSection.model_fields), "model.head")
"""Settings of a recipe that a file of others may not say, and `convert --set` can."""


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
    learned = [tensor for name, tensor in weights.state_dict.items() if name.rpartition(".")[2] not in STATISTICS]
    lines["parameters"] = f"{sum(tensor.numel() for tensor in learned):,}"
    rows = [*_rows(lines), *_rows(weights.meta, all_classes)]
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"{key:<{width}}  {value}".rstrip() for key, value in rows)


def _rows(values: Mapping[Any, Any], all_classes: bool = False, indent: str = "") -> Iterator[tuple[str, str]]:
    """Yields key and text of each value, and below the key of a table those of its own."""
    for name, value in values.items():
        if isinstance(value, Mapping | list | tuple) and not value:
            continue
        key = f"{indent}{_printable(name)}"
        if isinstance(value, Mapping):
            yield key, ""
            yield from _rows(value, indent=f"{indent}  ")
        elif (
            name in ("classes", "class_names") and not indent and isinstance(value, list | tuple) and len(value) > _FEW
        ):
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
    source: Path,
    target: Path,
    to: str,
    heads: int | None = None,
    bare_names: bool = False,
    force: bool = False,
    weights: WeightsKind | None = None,
    settings: Sequence[str] = (),
) -> ModelConfig:
    """Writes the weights of a file in another format, and a card beside them where none stands or `force` is set.

    Returns the architecture, which the file written need not say.

    to: "crate-dist", "reference" or "safetensors"; bare_names: no "module." in the published code's names
    weights: "ema": their moving average, where `source` has it beside them
    settings: KEY=VALUE of [images] and of `_SETTABLE`, for what `source` does not say, or says wrong
    Raises WeightsError when `source` or a setting cannot be used, or `target` exists and is not to be replaced;
    OSError.
    """
    if target.exists() and not force:
        raise WeightsError(f"{target} exists; --force replaces it")
    if not target.absolute().parent.is_dir():
        raise WeightsError(f"{target} cannot be written: there is no folder {target.absolute().parent}; make it first")
    model, meta = load_model(source, heads, weights)
    config, images = _said(settings, model.config)
    meta |= images
    if to == "reference":
        export_reference(target, config, model.state_dict(), meta, "" if bare_names else "module.")
    else:
        export = export_safetensors if to == "safetensors" else export_model
        export(target, config, model.state_dict(), meta)
    if force or not card_path(target).exists():
        write_card(target, config, meta)
    return config


def _said(settings: Sequence[str], config: ModelConfig) -> tuple[ModelConfig, dict[str, Any]]:
    """Returns the architecture that settings make of `config`, and what they say of [images]. Raises WeightsError."""
    values = dict[str, Any]()
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or key not in _SETTABLE:
            raise WeightsError(f"--set {text}: expected one of {', '.join(_SETTABLE)}, then = and a value")
        values[key] = parse_value(f"[{value}]" if "," in value and not value.startswith("[") else value)
    model = {key.removeprefix("model."): value for key, value in values.items() if key.startswith("model.")}
    images = {key.removeprefix("images."): value for key, value in values.items() if key.startswith("images.")}
    try:
        if model.get("head", config.head) not in HEADS:
            raise ValueError(f"head is one of {', '.join(HEADS)}, not {model['head']!r}")
        section = ImageSection(**images).model_dump(mode="json", include=set(images))
        return dataclasses.replace(config, **model), section
    except ValidationError as error:
        first = error.errors()[0]
        raise WeightsError(f"--set images.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (ValueError, TypeError) as error:
        raise WeightsError(f"--set model.head: {error}") from error
