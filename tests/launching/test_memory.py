"""The memory that the launcher foretells is what torch keeps."""

from __future__ import annotations

import gc
import re
import shutil
from pathlib import Path

import pytest
import torch

from crate_dist.config import Recipe, load_recipe
from crate_dist.config.archs import ARCHS
from crate_dist.doctor.fake_cluster import fake_cluster
from crate_dist.launching.memory import (
    advice,
    checkpoint_bytes,
    kept_bytes,
    largest_micro_batch,
    parameters,
    state_bytes,
    step_bytes,
)
from crate_dist.launching.preflight import Preflight
from crate_dist.launching.showing import summary
from crate_dist.models.build import build_model, model_config
from crate_dist.models.costs import RULES
from crate_dist.run.folder import RunFolder
from crate_dist.training.engine import Engine
from crate_dist.training.out_of_memory import explanation
from crate_dist.training.utilisation import Utilisation


def recipe(arch: str = "crate_tiny", *overrides: str) -> Recipe:
    return load_recipe(arch, ["train.precision=fp32", *overrides])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize(
    ("again", "count"), [(0, 4), (5, 4), (12, 4), (0, 16), (5, 16)]
)  # ISTA in two products; in one
def test_what_autograd_keeps_is_what_was_foretold(again: int, count: int, precision: str) -> None:
    settings = recipe("crate_tiny", "model.image_size=112", f"train.recompute={again}", f"train.precision={precision}")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = build_model(settings.model, 1000, seed=0).to(dtype)
    model.set_execution(recompute=again, autocast=precision == "autocast", images=count)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.randn(count, 3, 112, 112, dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(images)
    assert logits.requires_grad
    assert kept_bytes(settings, count) == pytest.approx(sum(kept.values()), rel=0.1)


def bytes_of_tensors() -> int:
    gc.collect()
    storages = [found.untyped_storage() for found in gc.get_objects() if isinstance(found, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("optimizer", ["lion", "adamw"])
def test_what_one_rank_of_eight_holds_between_steps_was_foretold(precision: str, optimizer: str) -> None:
    settings = recipe(
        "crate_tiny",
        f"train.precision={precision}",
        f"optim.name={optimizer}",
        "train.global_batch=8",
        f"optim.ema_decay={0.9 * (optimizer == 'adamw')}",
    )
    before = bytes_of_tensors()
    with fake_cluster(8):
        engine = Engine(build_model(settings.model, 1000, seed=0), settings, torch.device("cpu"), 1, 1)
        engine.step(iter([(torch.randint(256, (1, 224, 224, 3), dtype=torch.uint8), torch.zeros(1).long())]), 1e-3, 0)
        assert state_bytes(settings, 8) == pytest.approx(bytes_of_tensors() - before, rel=0.02)


def test_recomputing_needs_less_and_what_fits_is_proposed() -> None:
    plain, again = recipe("crate_large", "train.precision=bf16"), recipe("crate_large", "train.recompute=24")
    again = again.model_copy(update={"train": again.train.model_copy(update={"precision": "bf16"})})
    assert step_bytes(again, 128, 32) < step_bytes(plain, 128, 32) / 3
    fits = largest_micro_batch(plain, 16, 40e9)
    assert step_bytes(plain, fits, 16) < 40e9
    assert (2048 // 16) % fits == 0
    assert f"train.micro_batch={fits}" in advice(plain, 2048, 16, 40)
    assert advice(plain, 128, 32, 8).endswith(f" or --set train.recompute={ARCHS['crate_large'].depth} fits")
    assert largest_micro_batch(plain, 16, 1e6) == 0
    assert "not even one image would fit" in advice(plain, 128, 16, 0.1)
    assert "--set" not in advice(plain, 128, 16, 0.1)
    assert "train.recompute=24 --set train.micro_batch=" in advice(plain, 2048, 1, 30)  # alone it would not do


def test_of_a_part_without_a_rule_it_is_said_that_nothing_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = recipe("crate_tiny")
    monkeypatch.delitem(RULES["mixer"], "mssa")
    assert advice(settings, 128, 8, 80) == "what mixer = 'mssa' costs is not known: it has no rule in models/costs.py"
    assert "what mixer = 'mssa' costs is not known" in explanation(settings, 128, 8, 70, 80)
    unknown = Utilisation(model_config(settings.model, 10), settings, 1, torch.device("cpu"))
    assert unknown.scalars(10.0) == {}
    run = Preflight(RunFolder(tmp_path / "run"), False, tmp_path, 800, 80, 10, 8, 128, 1, None, False)
    assert summary(settings, run).startswith(str(run))
    said = summary(settings, run)
    assert "costs is not known" in said
    assert re.search(
        r"checkpoints +more than [\d.]+ MB every 500 steps; .* are kept: more than [\d.]+ MB of .* free$", said
    )
    less = checkpoint_bytes(settings)
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=less))
    assert "TOO LITTLE, and saves will fail" in summary(settings, run)
    monkeypatch.undo()
    assert "costs is not known" not in summary(settings, run)
    assert "more than" not in summary(settings, run)
    assert less < checkpoint_bytes(settings) == 4 * 2 * parameters(settings)
