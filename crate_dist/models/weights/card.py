"""Writes the model card beside exported weights: their origin and accuracy, how to load and to cite them.

A card says what the weights' own `meta` says, so that a file which was converted or passed on can still be described;
what is not known is left out. The licence is for the user to name, and kept when a card is written anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from crate_dist.config import new_names
from crate_dist.config.archs import Arch
from crate_dist.config.parts import PARTS as TABLES
from crate_dist.files import write_whole
from crate_dist.models.build import find_arch
from crate_dist.models.config import ModelConfig
from crate_dist.models.parts import find_part
from crate_dist.models.transformer import Transformer
from crate_dist.models.weights.families import FAMILIES, family_that_computes, parts_of
from crate_dist.models.weights.families.family import Family

_LICENCE = "licence"
_NO_LICENCE = "*to be named by whoever shares these weights*"
_ENDINGS = (".pth.tar", ".safetensors", ".pth", ".pt")


def card_path(weights: Path) -> Path:
    """Returns where the card of a file of weights stands: model-best.md beside model-best.pt."""
    stem = next((weights.name.removesuffix(end) for end in _ENDINGS if weights.name.endswith(end)), weights.name)
    return weights.with_name(f"{stem}.md")


def write_card(weights: Path, config: ModelConfig, meta: Mapping[str, Any]) -> Path:
    """Writes the card of a file of weights, whole or not at all, and returns where it stands.

    meta: as of the export; a licence that was filled in into the card that stands there is kept. Raises OSError.
    """
    path = card_path(weights)
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.search(rf"^\| {_LICENCE} \| (.+) \|$", before, re.MULTILINE)
    write_whole(path, model_card(weights.name, config, meta, found[1] if found else _NO_LICENCE))
    return path


def model_card(name: str, config: ModelConfig, meta: Mapping[str, Any], licence: str = _NO_LICENCE) -> str:
    """Returns the text of a card, in Markdown. name: of the file of weights; meta: whatever came with them."""
    family = family_that_computes(config)
    origins = {} if family else _origins(config)
    cited = {one.paper: one.citation for one in (family, *origins.values()) if one}
    title = _cell(meta.get("recipe") or find_arch(config) or (family.name if family else "Image classifier"))
    parts = [
        f"# {title}",
        f"{f'A {_link(family)}' if family else 'An'} image classifier for {config.num_classes:,} classes, "
        f"trained or converted with crate-dist.{'' if family else _composed(config, origins)}",
        _table([*_origin(config, meta), (_LICENCE, licence)]),
        "## Loading",
        _loading(name, config, meta),
    ]
    if isinstance(values := meta.get("recipe_values"), Mapping):
        parts += ["## Recipe", _table([(f"`{key}`", value) for key, value in sorted(new_names(values).items())])]
    if cited:
        parts += ["## Citation", "```bibtex\n" + "\n\n".join(cited.values()) + "\n```"]
    return "\n\n".join(parts) + "\n"


def _origins(config: ModelConfig) -> dict[str, Family | None]:
    """Returns whose each part is that has a class: the first family with it, or with one that it derives from or to."""
    first = sorted(FAMILIES, key=lambda family: family.paper)  # numbers of arXiv are in the order of time
    found = dict[str, Family | None]()
    for name, table in TABLES.items():
        part = find_part(table, getattr(config, name))
        theirs = ((family, find_part(table, getattr(_row(family), name))) for family in first)
        found[name] = next((f for f, other in theirs if issubclass(part, other) or issubclass(other, part)), None)
    return found


def _composed(config: ModelConfig, origins: Mapping[str, Family | None]) -> str:
    """Says what a model is made of that no published code computes, and whose each part is, as far as it is known."""
    parts = []
    for name, part in parts_of(config).items():
        family = origins.get(name)
        how = "of" if family and getattr(_row(family), name) == part else "after"
        parts.append(f"{name} {part}{f' {how} {_link(family)}' if family else ''}")
    return f" Its parts are nobody's together: {', '.join(parts)}."


def _row(family: Family) -> Arch:
    return family.row(next(iter(family.sizes)))


def _link(family: Family) -> str:
    return f"[{family.name}](https://arxiv.org/abs/{family.paper})"


def _origin(config: ModelConfig, meta: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Transformer(config).parameters())
    yield (
        "architecture",
        f"{find_arch(config) or 'of no published size'}: {config.depth} layers of width {config.dim}, {config.heads} "
        f"heads; images of {config.image_size} pixels in patches of {config.patch_size}",
    )
    yield "parameters", f"{parameters:,}"
    data = meta.get("data")
    for split, facts in data.items() if isinstance(data, Mapping) else ():
        if isinstance(facts, Mapping):
            yield f"data, {split}", _data(facts)
    for note in _mappings(meta.get("changed_data")):
        changes = note.get("changes")
        words = "; ".join(f"{what}: {how}" for what, how in changes.items()) if isinstance(changes, Mapping) else ""
        yield f"data changed after step {_cell(note.get('step'))}", words
    yield "steps", meta.get("step")
    epochs = meta.get("epochs", meta.get("epoch"))
    yield "epochs", f"{epochs:.4g}" if isinstance(epochs, (int, float)) else epochs
    if isinstance(decay := meta.get("ema_decay"), float):
        yield "weights", f"their exponential moving average over the training, decay {decay:g} per step"
    yield from _accuracy(meta)
    yield "precision in training", meta.get("precision")
    code = meta.get("code")
    if isinstance(code, Mapping):
        commit = code.get("commit")
        yield "code", commit and f"crate-dist, commit {commit}{', with changes' if code.get('changed') else ''}"
        packages = code.get("packages")
        if isinstance(packages, Mapping):
            versions = {"python": code.get("python"), **packages}
            yield "versions", ", ".join(f"{package} {version}" for package, version in versions.items() if version)


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _data(facts: Mapping[str, Any]) -> str:
    shown = [str(facts["name"])] if facts.get("name") else []
    shown += [f"{facts[key]:,} {key}" for key in ("samples", "classes") if isinstance(facts.get(key), int)]
    shown += [str(facts["origin"])] if facts.get("origin") else []
    shown += [f"fingerprint {facts['fingerprint']}"] if facts.get("fingerprint") else []
    return ", ".join(shown)


def _accuracy(meta: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    metrics = meta.get("metrics")
    if isinstance(metrics, Mapping):
        units = {"val/top1": ("top-1", " %"), "val/top5": ("top-5", " %"), "val/loss": ("loss", "")}
        known = {key: metrics[key] for key in units if isinstance(metrics.get(key), (int, float))}
        shown = [f"{units[key][0]} {value:.4g}{units[key][1]}" for key, value in known.items()]
        at = meta.get("evaluated_at", meta.get("step"))
        yield "validation", shown and ", ".join(shown) + (f", after step {at:,}" if isinstance(at, int) else "")
    for key in ("best_acc1", "acc"):  # as the published code calls it
        if isinstance(accuracy := meta.get(key), (int, float)):
            yield "validation", f"top-1 {accuracy:.4g} %, the best of its run"


def _loading(name: str, config: ModelConfig, meta: Mapping[str, Any]) -> str:
    side = config.image_size
    text = f"""\
```python
import crate_dist

model = crate_dist.load("{name}")
images = model.preprocess(["photo.jpg"])
logits = model(images)  # float, (batch, 3, {side}, {side}) -> (batch, {config.num_classes})
```"""
    if all(isinstance(meta.get(key), (list, tuple)) for key in ("mean", "std")):
        mean, std = (", ".join(map(str, meta[key])) for key in ("mean", "std"))
        text += (
            f"\n\nImages are RGB from 0 to 1: {_fitting(side, meta)}, less the mean ({mean}), divided by ({std}). "
            f"`python -m crate_dist.evaluate {name} --data DIR` does all of it."
        )
    if meta.get("classes"):
        text += " `model.classes` names the classes in the order of the logits."
    return text


def _fitting(side: int, meta: Mapping[str, Any]) -> str:
    if meta.get("eval_fit") == "stretch":
        return f"both sides resized to {side} pixels{_filter(meta)}"
    crop = meta.get("eval_crop")
    resized = ""
    if isinstance(crop, float) and crop > 0:
        resized = f"the short side resized to {round(side / crop)} pixels{_filter(meta)}, "
    return f"{resized}the central {side} x {side} cut out"


def _filter(meta: Mapping[str, Any]) -> str:
    return f" ({_cell(meta['resize_filter'])})" if meta.get("resize_filter") else ""


def _table(rows: list[tuple[str, Any]]) -> str:
    lines = [f"| {key} | {_cell(value)} |" for key, value in rows if value not in (None, "", [])]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    """Brings a value on one line of a table: `meta` may come from a file of anybody's making."""
    return re.sub(r"\s+", " ", str(value)).replace("|", r"\|")[:1000]
