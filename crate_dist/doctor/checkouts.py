"""The published codes' models: imported from checkouts of them, with the weights of ours."""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from crate_dist.config import RecipeError
from crate_dist.models.config import ModelConfig
from crate_dist.models.transformer import Transformer
from crate_dist.models.weights.families import family_that_computes


@dataclass(frozen=True)
class Source:
    """Where the model of a family is published: whose code, the file in it, and what makes a model of it."""

    code: str
    file: str
    build: Callable[[ModuleType, ModelConfig], nn.Module]


class NotImported(RecipeError):
    """A published model cannot be imported here."""


def source_of(config: ModelConfig) -> Source | None:
    """Returns where a model of these parts is published; None: nowhere that is known."""
    family = family_that_computes(config)
    return SOURCES.get(family.name) if family else None


def load_model(config: ModelConfig, checkout: Path) -> nn.Module:
    """Returns the published model, freshly initialised, from a checkout of its code.

    SyncBatchNorm, which computes on GPUs alone, becomes BatchNorm2d. Raises RecipeError where the checkout has no such
    model, and NotImported where what its code needs (timm, for ToST and ViT) is not installed.
    """
    source = source_of(config)
    if source is None:
        raise RecipeError("--reference: no published code has a model of these parts")
    file = checkout / source.file
    if not file.is_file():
        raise RecipeError(f"--reference {checkout}: no {source.file} there; give a checkout of the published code")
    try:
        module = _imported(file)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision's, where it is not built for this torch
        raise NotImported(f"{source.file} cannot be imported here: {error}") from error
    with redirect_stdout(io.StringIO()):  # ToST's says what it is made of
        model = source.build(module, config)
    return _Logits(_on_any_device(model))


def twin(model: Transformer, checkout: Path) -> nn.Module:
    """Returns the published model with our model's weights. Raises as `load_model` does."""
    published = load_model(model.config, checkout)
    family = family_that_computes(model.config)
    assert family is not None  # load_model found its source
    published.get_submodule("model").load_state_dict(family.to_theirs(model.state_dict()))
    return published


@torch.no_grad()
def difference(model: Transformer, published: nn.Module, images: Tensor) -> float:
    """Returns the largest difference of two models' logits in evaluation mode, as a share of the largest logit."""
    ours, theirs = (one.eval()(images) for one in (model, published))
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


class _Logits(nn.Module):
    """A model's logits alone: ToST's returns them twice while it trains."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, image_size, image_size) -> (b, classes)"""
        logits: Tensor | tuple[Tensor, Tensor] = self.model(images)
        return logits[0] if isinstance(logits, tuple) else logits


def _imported(file: Path) -> ModuleType:
    """Imports a file by its path: two of these codes have a package `model`. What lies beside it can be imported."""
    name = "published_" + "_".join(file.with_suffix("").parts[-3:])
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(file.parent))
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        finally:
            with suppress(ValueError):
                sys.path.remove(str(file.parent))
    return sys.modules[name]


def _on_any_device(model: nn.Module) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.SyncBatchNorm):
                setattr(parent, name, nn.BatchNorm2d(child.num_features, child.eps, child.momentum))
    return model


def _crate_like(module: ModuleType, c: ModelConfig, name: str = "CRATE", **parts: Any) -> nn.Module:
    sizes = {key: getattr(c, key) for key in ("image_size", "patch_size", "num_classes", "dim", "depth", "heads")}
    model: nn.Module = getattr(module, name)(**sizes, dim_head=c.dim // c.heads, **parts)
    return model


def _crate(module: ModuleType, c: ModelConfig) -> nn.Module:
    # Called Transformer before the code had its present name, which its layers have today.
    return _crate_like(module, c, "CRATE" if hasattr(module, "CRATE") else "Transformer")


def _cbt(module: ModuleType, c: ModelConfig) -> nn.Module:
    return _crate_like(module, c, "VisionTransformer", attn=getattr(module, c.mixer.upper()), ffn=module.ISTA)


def _timm_like(module: ModuleType, c: ModelConfig, **parts: Any) -> nn.Module:
    model: nn.Module = module.VisionTransformer(
        img_size=c.image_size,
        patch_size=c.patch_size,
        num_classes=c.num_classes,
        embed_dim=c.dim,
        depth=c.depth,
        num_heads=c.heads,
        mlp_ratio=c.ratio,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=c.norm_eps),
        **parts,
    )
    return model


def _tost(module: ModuleType, c: ModelConfig) -> nn.Module:
    return _timm_like(module, c, eta=c.layer_scale, tokens_norm=True)


_CBT = Source("cbt", "CBSA_image_classification/models.py", _cbt)
SOURCES = {
    "CRATE": Source("crate", "model/crate.py", _crate),
    "CRATE-α": Source("alpha", "torch_inference/model/crate_alpha.py", _crate_like),
    "ToST": Source("tost", "tost_vision/tost.py", _tost),
    **dict.fromkeys(("CBT", "CRATE baseline of CBT", "ToST baseline of CBT"), _CBT),
    "ViT": Source("crate", "model/vit.py", partial(_timm_like, global_pool=True)),
}
"""Name of a family -> where its model is published. CRATE's code has the ViT that it compares with."""
