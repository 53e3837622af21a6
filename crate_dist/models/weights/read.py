"""Reads weights: our model-only exports, and every checkpoint that the published codes write.

    crate-dist's export                {"format", "model", "state_dict", "meta"}, or a safetensors file that says these
    CRATE's training code's            {"epoch", "arch", "state_dict", "best_acc1", "optimizer", "scheduler"}
    its fine-tuning code's             {"model": state_dict, "optimizer", "scaler"}; older ones {"net", "acc", "epoch"}
    ToST's                             {"model": state_dict, "model_ema", "args": Namespace, "optimizer", …}
    a bare state dict as CRATE-α's, a safetensors file of any origin
    CRATE-α's training code's          .npz of JAX's arrays: the parameters alone, or {"params/…", "opt/…", "chrono/…"}

each under crate-dist's names or those of a family's published code (`families/`), with or without the "module." of
DataParallel and DistributedDataParallel. Files are opened so that no code in them runs (`opening`).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from crate_dist.config import WeightsKind
from crate_dist.models.batch_norm import STATISTICS
from crate_dist.models.config import ModelConfig, Pool
from crate_dist.models.transformer import Transformer
from crate_dist.models.weights.arrays import is_archive, open_arrays
from crate_dist.models.weights.families import alpha, alpha_jax
from crate_dist.models.weights.families.family import Family, StateDict
from crate_dist.models.weights.names import (
    FORMATS,
    RECORDED,
    SCALE,
    UNPLACED,
    UNSEEN,
    WeightsError,
    check_fit,
    config_from_plain,
    infer_config,
    join_classifier_heads,
    not_finite,
    recognised,
)
from crate_dist.models.weights.opening import open_file, options_of
from crate_dist.models.weights.provenance import of_checkpoint, of_tensors

logger = logging.getLogger(__name__)

_STATE_DICTS = ("state_dict", "model", "net", "model_state_dict", "module")
"""Where codes keep their weights: the published ones, then PyTorch's tutorials, then DeepSpeed."""
_AVERAGES = ("model_ema", "state_dict_ema", "ema")
"""Where training codes keep the moving average of their weights."""
_FEW = 4
_KEPT = ("epoch", "arch", "best_acc1", "acc", *RECORDED)


@dataclass(frozen=True)
class Weights:
    """The content of one file of weights.

    kind: "crate-dist", "safetensors", "reference", "reference fine-tuning", "state dict" or "jax"
    state_dict: tensors on the CPU under crate-dist's names, in the dtype of the file, running statistics in fp32
    config: the architecture, where the file says it; meta: plain values that came along
    told: where it does not, what it says of what the shapes leave open, by the names of ModelConfig
    notes: what was changed in reading, in words
    family: whose names they had
    """

    kind: str
    state_dict: dict[str, Tensor]
    config: ModelConfig | None
    meta: dict[str, Any]
    told: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    family: Family | None = None

    def architecture(self, heads: int | None = None) -> tuple[ModelConfig, tuple[str, ...]]:
        """Returns the model that the weights fit, and what has to be said of how that and they were found.

        heads: of the model, for files that do not tell
        Raises WeightsError when the weights fit none, when neither the file nor `heads` nor a published size tells the
        heads, or when the file tells others.
        """
        told = self.config.heads if self.config else self.told.get("heads")
        if None not in (heads, told) and heads != told:
            raise WeightsError(f"its model has {told} heads, and {heads} were given")
        config = self.config or self._inferred(heads or told)
        check_fit(self.state_dict, config)
        notes = self.notes
        if name := not_finite(self.state_dict):
            notes = (
                *notes,
                f"{name!r} has values that are NaN or infinite: its training has diverged, or it is damaged",
            )
        in_shapes = self.family.tells(self.state_dict).get("heads") if self.family else None
        if heads or told or in_shapes:
            return config, notes
        assert self.family is not None  # whose size told them
        published = self.family.published(config.dim, config.depth, config.patch_size)
        taken = (
            f"it does not tell its heads: {config.heads} taken, as in the published {published}, which has its "
            "width, depth and patches; --heads N would say otherwise"
        )
        return config, (*notes, taken)

    def _inferred(self, heads: int | None) -> ModelConfig:
        config = infer_config(self.state_dict, heads, self.family)
        try:
            return replace(config, **self.told)
        except ValueError as error:
            said = ", ".join(f"{name} = {value}" for name, value in self.told.items())
            raise WeightsError(f"beside its weights stands {said}, which fits no model with these: {error}") from error


def read_weights(path: str | Path, weights: WeightsKind | None = None) -> Weights:
    """Reads a file of any of the kinds above.

    weights: "ema": their moving average, where a training code's checkpoint has one beside them
    Raises WeightsError when there is no such file, when it is damaged or no checkpoint, or holds no such tensors.
    """
    try:
        found = _read(Path(path), weights)
    except WeightsError:
        raise
    except ValueError as error:  # of names and shapes that cannot be ours
        raise WeightsError(f"{path}: {error}") from error
    there = "ema" if "ema_decay" in found.meta else "raw"
    if weights not in (None, there):
        what = "their moving average" if there == "ema" else "them as they are, or does not say more"
        raise WeightsError(f"{weights!r} weights were asked for, and {path} has {what}; a run may have both")
    return found


def _read(path: Path, kind: WeightsKind | None) -> Weights:
    if _is_safetensors(path):
        return _read_safetensors(path)
    if is_archive(path):
        return _read_jax(path)
    content = open_file(path)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, no checkpoint and no state dict")
    if "format" in content:
        return _read_export(path, content)
    average = next((key for key in _AVERAGES if isinstance(content.get(key), Mapping)), None)
    key = next((key for key in _STATE_DICTS if isinstance(content.get(key), Mapping)), average)
    if key is None:
        return _of_others("state dict", _tensors(path, content))
    if average and (kind == "ema" or key == average):
        weights = _of_checkpoint(_tensors(path, content[average]), key, content)
        weights = replace(weights, meta=weights.meta | {"ema_decay": options_of(content).get("model_ema_decay")})
        note = f"it holds the moving average of weights alone, {average}" if key == average and not kind else ""
    else:
        weights = _of_checkpoint(_tensors(path, content[key]), key, content)
        note = f"beside its weights stands their moving average, {average}; --weights ema would take that"
        note = note if average and not kind else ""
    return replace(weights, notes=(*weights.notes, note)) if note else weights


def load_model(
    path: str | Path, heads: int | None = None, weights: WeightsKind | None = None
) -> tuple[Transformer, dict[str, Any]]:
    """Reads a file of any kind: (model, meta). The model is on the CPU, in training mode, in the dtype of the file,
    but for running statistics, which are fp32.

    heads: for weights of a size that was not published, in files that do not say it; weights: as of `read_weights`
    Logs what was taken for granted. Raises WeightsError when the file or its weights cannot be used.
    """
    found = read_weights(path, weights)
    try:
        config, notes = found.architecture(heads)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    for note in notes:
        logger.warning("%s: %s", path, note)
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(found.state_dict, assign=True)
    return model, found.meta


def _of_checkpoint(state: Mapping[str, Tensor], key: str, content: Mapping[str, Any]) -> Weights:
    """Reads a checkpoint of somebody's training, `content`, whose weights stand under `key`."""
    renamed, family, _ = recognised(state)
    origin, options = of_checkpoint(family, key, content), options_of(content)
    meta = dict(origin.images)
    meta |= {"arch": options["model"]} if isinstance(options.get("model"), str) else {}
    meta |= {name: _plain(content[name]) for name in _KEPT if name in content}
    said = {"image_size": options.get("input_size"), **content}
    told = {name: said[name] for name in (*UNSEEN, UNPLACED) if _is_possible(name, said.get(name))}
    if _is_possible(SCALE, scale := said.get(SCALE)) and any(name.endswith("_scale") for name in renamed):
        told[SCALE] = scale
    kind = "reference fine-tuning" if origin.fine_tuned else "reference"
    return _joined(kind, renamed, family, meta, {**origin.told, **told}, origin.notes)


def _of_others(kind: str, state: Mapping[str, Tensor]) -> Weights:
    """Reads tensors alone; those of a published code are known by their names."""
    renamed, family, published = recognised(state)
    origin = of_tensors(family, published)
    return _joined(kind, renamed, family, dict(origin.images), {}, origin.notes)


def _joined(
    kind: str, state: StateDict, family: Family, meta: dict[str, Any], told: Mapping[str, Any], notes: tuple[str, ...]
) -> Weights:
    state_dict, note = join_classifier_heads(state)
    return Weights(kind, state_dict, None, meta, told, (*filter(None, [note]), *notes), family)


def _is_possible(name: str, value: Any) -> bool:
    """Returns whether a value of somebody's file could be that of a ModelConfig's field."""
    if name in ("heads", UNPLACED):
        return type(value) is int and value > 0
    if name == "pool":
        return isinstance(value, str) and value in get_args(Pool)
    return type(value) in (int, float) and (0 < value < math.inf or (name == "ista_threshold" and value == 0))


def _read_export(path: Path, content: Mapping[str, Any]) -> Weights:
    with _whole_export(path, content["format"]):
        state_dict = _tensors(path, content["state_dict"])
        return Weights("crate-dist", state_dict, config_from_plain(content["model"]), dict(content["meta"]))


@contextmanager
def _whole_export(path: Path, found: Any) -> Iterator[None]:
    """Raises WeightsError where the format `found` is none of ours, and for what is missing or wrong in one that is."""
    if found not in FORMATS:
        raise WeightsError(f"{path} has the format {found!r}; this version reads {' and '.join(map(repr, FORMATS))}")
    try:
        yield
    except WeightsError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise WeightsError(f"{path} is no whole {found} export: {error}") from error


def _is_safetensors(path: Path) -> bool:
    """Returns whether a file begins as one: the length of a JSON header, and the header."""
    if path.is_dir():
        raise WeightsError(f"{path} is a folder; give a file of weights in it")
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except FileNotFoundError as error:
        raise WeightsError(
            f"cannot read {path}: {error.strerror}; look at the path, also from where it starts"
        ) from error
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    return start[8:] == b"{" or path.suffix == ".safetensors"


def _read_safetensors(path: Path) -> Weights:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            about: dict[str, str] = file.metadata() or {}
            names: list[str] = file.keys()
            tensors = _tensors(path, {name: file.get_tensor(name) for name in names})
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is no safetensors file, or truncated or damaged: {error}") from error
    if "crate_dist" not in about:
        return _of_others("safetensors", tensors)
    with _whole_export(path, about["crate_dist"]):
        return Weights("safetensors", tensors, config_from_plain(json.loads(about["model"])), json.loads(about["meta"]))


def _read_jax(path: Path) -> Weights:
    arrays = open_arrays(path, alpha_jax.TREE)
    if not alpha_jax.is_alpha(arrays):
        few = ", ".join(f"{name} {tuple(array.shape)}" for name, array in list(arrays.items())[:_FEW])
        raise WeightsError(
            f"{path} holds {len(arrays)} arrays, {few}{', …' if len(arrays) > _FEW else ''}; of .npz, those with the "
            "parameters of CRATE-α's classifiers are read"
        )
    state_dict, told = alpha_jax.from_jax(arrays)
    return Weights("jax", state_dict, None, dict(alpha.FAMILY.evaluated), told, (), alpha.FAMILY)


def _tensors(path: Path, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    strange = [str(key) for key, value in state_dict.items() if not isinstance(value, Tensor)]
    if strange or not state_dict:
        found = f"holds {', '.join(strange[:4])}" if strange else "is empty"
        raise WeightsError(f"{path}: expected a state dict, names and tensors, but it {found}")
    return {
        name: tensor.to(STATISTICS.get(name.rpartition(".")[2], tensor.dtype)) for name, tensor in state_dict.items()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    return value
