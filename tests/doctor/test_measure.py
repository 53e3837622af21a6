"""The stages that compute and measure: whole in small on a CPU, and planted errors, which they must find."""

from __future__ import annotations

import dataclasses
import importlib
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from crate_dist.config import Recipe
from crate_dist.doctor.stage import Finding, Setting

pytestmark = pytest.mark.spawn


def setting(folder: Path, left_s: float = 600.0) -> Setting:
    scratch = folder / "stage"
    scratch.mkdir(parents=True)
    return Setting("cpu", True, scratch, time.monotonic() + left_s)


def elsewhere(work: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a process of its own, as a stage has: it joins a process group and sets variables."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crate_dist.train", "torch._dynamo"])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(work, *arguments).result()


def examined(stage: str, given: Setting, planted: Callable[[], None] | None = None) -> list[Finding]:
    torch.set_num_threads(2)
    module = importlib.import_module(f"crate_dist.doctor.{stage}")
    if planted:
        planted()
    return list(module.examine(given))


def failed(findings: list[Finding]) -> list[str]:
    return [finding.name for finding in findings if finding.passed is False]


@pytest.mark.parametrize(
    ("stage", "checks", "says"),
    [
        ("ceilings", 0, "product 1024³, bf16"),
        ("waits", 2, "ToST on one rank, mixed, averaged: waits for the device per step of 2 micro-batches"),
        ("ranks", 1, "crate_demo at 8, rank 0 of 32: sent per step"),
        ("speed", 0, "crate_demo at 4, published formulation, plain PyTorch"),
        ("kernels", 0, "crate_demo at 2, ISTA, one product, forward and backward"),
    ],
)
def test_a_stage_runs_whole_in_small(stage: str, checks: int, says: str, tmp_path: Path) -> None:
    findings = elsewhere(examined, stage, setting(tmp_path))
    assert not failed(findings)
    assert sum(finding.passed is True for finding in findings) == checks
    [measured] = [finding for finding in findings if finding.name == says]
    assert isinstance(measured.value, float)
    assert measured.value >= 0


def graphs_of_an_eager_engine(given: Setting) -> list[Finding]:
    from crate_dist.doctor import compile, waits
    from crate_dist.doctor.contestants import alone, made

    with alone(given) as device:
        engine, _ = made(waits.recipe_of(2, given), device)
        return list(compile.graphs(engine, device))


def test_training_that_stayed_eager_is_not_taken_for_compiled(tmp_path: Path) -> None:
    made, later = elsewhere(graphs_of_an_eager_engine, setting(tmp_path))
    assert (made.value, made.passed) == (0, False)
    assert (later.value, later.passed) == (0, True)


def test_compiling_says_which_compiler_it_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for device, passed, missing in (("cpu", None, "g++"), ("cuda", False, "gcc")):
        [finding] = examined("compile", dataclasses.replace(setting(tmp_path / device), device=device))
        assert finding.passed is passed
        assert missing in finding.note


def test_a_cpu_compiles_only_where_there_is_time(tmp_path: Path) -> None:
    [finding] = elsewhere(examined, "compile", setting(tmp_path, left_s=60.0))
    assert (finding.value, finding.passed) == ("left out" if shutil.which("g++") else "not possible", None)


def without_compiling() -> None:
    from crate_dist.doctor import correct

    correct.COMPILE_SMALL_S = float("inf")  # the stage compile and the tests of compiling do


def test_what_is_right_is_found_right_in_every_precision(tmp_path: Path) -> None:
    findings = elsewhere(examined, "correct", setting(tmp_path), without_compiling)
    assert not failed(findings)
    names = [finding.name for finding in findings if finding.passed]
    for precision in ("bf16", "autocast", "fp32"):
        assert f"logits and gradients, {precision}, eager" in names
        assert f"logits and gradients, {precision}, eager, recomputed" in names
    assert sum("attention, " in name for name in names) >= 2
    left = [finding.name for finding in findings if finding.value == "left out"]
    assert len(left) == 6
    assert all("compiled" in name for name in left)


def found_when_planted(given: Setting) -> dict[str, list[str]]:
    """Plants one error after the other, and returns what the part of the stage that should see it calls failed."""
    from crate_dist.doctor import correct, correct_step, waits
    from crate_dist.doctor.contestants import alone, made
    from crate_dist.doctor.exact import new_case
    from crate_dist.models.tokenwise.ista import ISTA
    from crate_dist.models.transformer import Transformer
    from crate_dist.training.engine import Engine
    from crate_dist.training.partitions import Partitions
    from crate_dist.training.zero import Guard

    torch.set_num_threads(2)
    without_compiling()
    found: dict[str, list[str]] = {}
    place, build, loss = Transformer._positions, Engine.__init__, Engine.criterion

    def positions_with_half_a_gradient(self: Transformer, rows: int, cols: int) -> torch.Tensor:
        positions = place(self, rows, cols)
        return 0.5 * positions + 0.5 * positions.detach()

    def build_without_clipping(self: Engine, model: Transformer, recipe: Recipe, *rest: Any) -> None:
        optim = recipe.optim.model_copy(update={"grad_clip": 0})
        build(self, model, recipe.model_copy(update={"optim": optim}), *rest)

    def look_at_the_loss(self: Engine, *given: Any) -> torch.Tensor:
        value = loss(self, *given)
        assert all(value.item() > 0 for _ in range(5))
        return value

    with alone() as device:
        case = new_case(small=True, seed=1)
        plants: dict[str, tuple[Callable[[], Iterator[Finding]], dict[tuple[Any, str], Any]]] = {
            "half a gradient": (
                lambda: correct.passes(case, given, device),
                {(Transformer, "_positions"): positions_with_half_a_gradient},
            ),
            "a wrong η": (
                lambda: correct.passes(case, given, device),
                {
                    (ISTA, "forward"): lambda self, z: torch.relu(
                        z + 0.09 * (z - z @ self.dictionary.T) @ self.dictionary
                    )
                },
            ),
            "no clipping": (
                lambda: correct_step.clipping(case, device),
                {(Engine, "__init__"): build_without_clipping},
            ),
            "no look at what is finite": (
                lambda: correct_step.planted_inf(case, device, compiled=False),
                {(Guard, "note"): lambda self, step: None},
            ),
            "weights alone are loaded": (
                lambda: correct_step.saved_and_loaded(case, given, device),
                {(Partitions, "load"): lambda self, checkpoint: self.fill(checkpoint.reader().copy)},
            ),
            "a look at each loss": (
                lambda: iter([waits.waits_of("ours", waits.steps_of(made(waits.recipe_of(2, given), device)[0]), 1)]),
                {(Engine, "criterion"): look_at_the_loss},
            ),
        }
        for name, (look, errors) in plants.items():
            with pytest.MonkeyPatch.context() as planting:
                for (owner, attribute), error in errors.items():
                    planting.setattr(owner, attribute, error)
                found[name] = failed(list(look()))
    return found


def test_planted_errors_are_found(tmp_path: Path) -> None:
    found = elsewhere(found_when_planted, setting(tmp_path))
    for passes in (found["half a gradient"], found["a wrong η"]):
        assert "logits and gradients, fp32, eager" in passes
        assert "logits and gradients, fp32, eager, recomputed" in passes
    assert "logits and gradients, bf16, eager" in found["half a gradient"]
    assert len(found["no clipping"]) == 2
    assert found["no look at what is finite"] == ["an inf in a weight, lion", "an inf in a weight, adamw"]
    assert found["weights alone are loaded"] == ["saved and loaded, lion", "saved and loaded, adamw"]
    assert found["a look at each loss"] == ["ours: waits for the device per step of 1 micro-batch"]


def test_a_number_that_is_none_is_above_every_bound() -> None:
    from crate_dist.doctor.exact import compared

    plain = {"logits": 0.01, "gradient": 0.02, "other": 0.02}
    assert compared("well", {"logits": 0.02, "gradient": 0.03, "other": 0.0}, plain).passed is True
    for tensor in plain:
        finding = compared("nan", {**plain, tensor: float("nan")}, plain)
        assert finding.passed is False
        assert finding.note.startswith(f"of {tensor},")


@pytest.mark.parametrize(("share", "passed"), [(1.0, True), (0.86, True), (1.14, True), (0.8, False), (1.2, False)])
def test_an_estimate_of_memory_that_is_far_off_has_failed(share: float, passed: bool) -> None:
    from crate_dist.doctor.speed import memory

    assert memory("ours", 20e9, share * 20e9).passed is passed
