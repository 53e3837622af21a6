"""Published models are imported from checkouts, as they lie there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from crate_dist.config import RecipeError
from crate_dist.config.archs import ARCHS
from crate_dist.doctor.checkouts import NotImported, load_model, source_of
from crate_dist.models.config import ModelConfig

TOST = """
from beside import Norm
from torch import nn

class VisionTransformer(nn.Module):
    def __init__(self, *, img_size, num_heads, eta, **others):
        super().__init__()
        self.stem = nn.Sequential(Norm(3, eps=1e-3))
    def forward(self, images):
        x = self.stem(images).mean((2, 3))
        return (x, x) if self.training else x
"""


def config(arch: str) -> ModelConfig:
    return ModelConfig(image_size=32, patch_size=16, num_classes=3, **vars(ARCHS[arch]))


def test_every_arch_is_published_somewhere() -> None:
    assert all(source_of(config(arch)) for arch in ARCHS)


def test_a_published_model_runs_on_any_device_and_gives_its_logits_once(tmp_path: Path) -> None:
    (tmp_path / "tost_vision").mkdir()
    (tmp_path / "tost_vision/tost.py").write_text(TOST)
    (tmp_path / "tost_vision/beside.py").write_text("from torch.nn import SyncBatchNorm as Norm")
    path = list(sys.path)
    model = load_model(config("tost_tiny_12"), tmp_path)
    [norm] = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert type(norm) is nn.BatchNorm2d
    assert norm.eps == 1e-3
    assert model.train()(torch.ones(2, 3, 4, 4)).shape == (2, 3)
    assert model.eval()(torch.ones(2, 3, 4, 4)).shape == (2, 3)
    assert sys.path == path


def test_what_cannot_be_imported_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no model/crate\.py there; give a checkout"):
        load_model(config("crate_tiny"), tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/vit.py").write_text("import no_such_package")
    for _ in range(2):  # what failed half-way is not taken for imported
        with pytest.raises(NotImported, match="no_such_package"):
            load_model(config("vit_tiny"), tmp_path)
