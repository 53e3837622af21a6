"""A part that somebody adds trains, is saved whole and opens again, or is refused before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crate_dist.checkpoint import saving
from crate_dist.checkpoint.export import export
from crate_dist.checkpoint.finetune import begin_from
from crate_dist.checkpoint.format import Progress, other_head
from crate_dist.checkpoint.trained import load_trained
from crate_dist.config import Recipe, RecipeError, build_recipe
from crate_dist.config.parts import HEADS, TOKENWISE
from crate_dist.data.index import ShardIndex
from crate_dist.doctor.fake_cluster import fake_cluster
from crate_dist.models.batch_norm import GroupedBatchNorm
from crate_dist.models.build import build_model
from crate_dist.models.config import ModelConfig
from crate_dist.models.heads.linear import LinearHead
from crate_dist.models.tokenwise.ista import ISTA
from crate_dist.models.weights import load_model
from crate_dist.run.folder import RunFolder
from crate_dist.run.lock import Tenure
from crate_dist.training.engine import Engine
from crate_dist.training.finite import where_not_finite
from crate_dist.world import World
from tests.new_parts import add_part

ALONE = World(0, 1, 0, 1, "", 0, "alone")
BATCH = 4


class Offset(ISTA):
    """A token-wise part with a parameter that is not trained, and one that nothing reads."""

    key = "offset"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.fixed = nn.Parameter(torch.randn(config.dim), requires_grad=False)
        self.idle = nn.Parameter(torch.zeros(3))

    def forward(self, z: Tensor) -> Tensor:
        """(b, n, d) -> (b, n, d)"""
        return super().forward(z + self.fixed)


class NoBias(LinearHead):
    """A head whose map has no bias."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.linear = nn.Linear(config.dim, config.num_classes, bias=False)


class Normed(ISTA):
    """A token-wise part with batch norm."""

    key = "normed"
    norm = GroupedBatchNorm

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.inner = self.norm(config.dim)


class NormedByTorch(Normed):
    """One with torch's batch norm."""

    norm = nn.BatchNorm1d  # type: ignore[assignment]


def recipe(seed: int = 0, **model: Any) -> Recipe:
    small = {"arch": "crate_demo", "width": 24, "depth": 1, "heads": 3, "image_size": 16, "patch_size": 8}
    train = {"global_batch": BATCH, "epochs": 1, "precision": "bf16", "seed": seed}
    return build_recipe(
        {"name": "new", "model": small | model, "optim": {"lr": 1e-3, "ema_decay": 0.5}, "train": train},
        origin="a test",
    )


def engine_of(settings: Recipe, model: nn.Module | None = None) -> Engine:
    made = model or build_model(settings.model, 4, settings.train.seed)
    return Engine(made, settings, torch.device("cpu"), BATCH, 1)  # type: ignore[arg-type]


def test_what_is_not_trained_is_saved_exactly_and_begins_a_resume_an_export_and_another_run(
    tmp_path: Path, cast_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_part(monkeypatch, TOKENWISE, "offset", Offset)
    add_part(monkeypatch, HEADS, "no_bias", NoBias)
    settings = recipe(tokenwise="offset", head="no_bias")
    folder, train = RunFolder(tmp_path / "run"), ShardIndex.load(cast_shards / "train")
    folder.open(settings)
    begun = build_model(settings.model, 4, settings.train.seed)
    fixed = "layers.0.offset.fixed"
    exact = begun.state_dict()[fixed].clone()
    with fake_cluster(1):
        engine = engine_of(settings, begun)
        assert engine.module.state_dict()[fixed].dtype == torch.bfloat16
        images = torch.randint(0, 256, (BATCH, 16, 16, 3), dtype=torch.uint8)
        engine.step(iter([(images, torch.arange(BATCH))]), 1e-3, 0)
        state = engine.state(), engine.layouts, Progress(step=1, best_step=1), ALONE
        saved = saving.publish(folder.checkpoints, *state, buffers=engine.partitions.buffers())
        assert saved.weights("ema").keys() == engine.module.state_dict().keys()
        export(folder, settings, engine.module.config, saved.progress, 1.0, train, None, Tenure())
        exports = [load_model(folder.model(which))[0] for which in ("last", "best", "last-ema")]
        other = engine_of(recipe(1, tokenwise="offset", head="no_bias"))
        assert not torch.equal(other.module.state_dict()[fixed], exact.bfloat16())
        other.partitions.load(saved)
        assert torch.equal(other.module.state_dict()[fixed], exact.bfloat16())
        assert torch.equal(other.partitions.buffers()["fp32"][fixed], exact)
        assert torch.equal(other.predict(images), engine.predict(images))
        another = build_model(settings.model, 4, seed=1)
        begin_from(folder.path, another, train.classes, "keep")
    opened = load_trained(folder.path).model
    for model in (*exports, opened, another):
        assert torch.equal(model.state_dict()[fixed], exact)
    assert torch.equal(opened.state_dict()["head.linear.weight"], saved.weights()["head.linear.weight"])
    assert other_head(folder.path, saved.manifest, 4) == ""
    assert "has a model of 4 classes, and the data have 5" in other_head(folder.path, saved.manifest, 5)
    broken = build_model(settings.model, 4, seed=0)
    broken.head.linear.weight.register_hook(lambda gradient: gradient * torch.inf)
    found = where_not_finite(broken, lambda: broken(torch.ones(1, 3, 16, 16)).sum())
    assert found is not None
    assert found.startswith("the gradient of ")


def test_batch_norm_of_any_part_asks_for_a_group_and_torchs_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    add_part(monkeypatch, TOKENWISE, "normed", Normed)
    add_part(monkeypatch, TOKENWISE, "normed_by_torch", NormedByTorch)
    for part, said in (
        ("normed", r"layers\.0\.normed\.inner is batch norm, .* train\.group images, which is 1; --set train\.group="),
        ("normed_by_torch", r"layers\.0\.normed\.inner is torch's BatchNorm1d, .* GroupedBatchNorm of models/batch_"),
    ):
        with fake_cluster(1), pytest.raises(RecipeError, match=said):
            engine_of(recipe(tokenwise=part))
