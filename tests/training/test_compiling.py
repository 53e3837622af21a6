"""Compiled layers compute the same, once compiled, for every batch; where that fails, training goes on without."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from crate_dist.checkpoint import loading as checkpoint
from crate_dist.checkpoint import saving
from crate_dist.checkpoint.format import Progress
from crate_dist.config import AugmentSection, ImageSection, ModelSection, Recipe
from crate_dist.data.index import ShardIndex
from crate_dist.data.loader import Share, TrainLoader, train_transform
from crate_dist.data.order import Order
from crate_dist.data.reader import ShardReader
from crate_dist.doctor.end_to_end import compiled_seconds
from crate_dist.models.batch_norm import statistics, take_statistics
from crate_dist.models.build import build_model
from crate_dist.run.folder import RunFolder
from crate_dist.run.lock import ALONE
from crate_dist.training import compiling
from crate_dist.training.compiled_cache import CompiledCache
from crate_dist.training.lion import Lion
from crate_dist.training.watchdog import Watchdog
from crate_dist.world import World
from tests.ranks import REPOSITORY, spawn
from tests.training.test_engine import GLOBAL_BATCH, GOLDEN, batch_of, make_engine, recipe, take_steps

pytestmark = [
    pytest.mark.spawn,
    pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests, as one for all restarts of a run."""
    return tmp_path_factory.mktemp("inductor")


def with_train(**train: Any) -> Recipe:
    settings = recipe()
    return settings.model_copy(update={"train": settings.train.model_copy(update={"precision": "fp32", **train})})


def keep_in(cache: Path) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)


def weights_after(engine: Any, world: World, first: int, stop: int) -> list[torch.Tensor]:
    take_steps(engine, world, first, stop)
    return [part.clone() for part in engine.state()["fp32"]]


def disturbed_and_not(world: World, device: torch.device, cache: Path, folder: Path) -> bool:
    keep_in(cache)
    undisturbed = weights_after(make_engine(world, device, with_train(compile=True)), world, 0, 5)
    engine = make_engine(world, device, with_train(compile=True))
    take_steps(engine, world, 0, 3)
    saving.publish(folder, engine.state(), engine.layouts, Progress(step=3), world)
    again = make_engine(world, device, with_train(compile=True))
    found = checkpoint.find_newest(folder, world)
    assert found is not None
    again.partitions.load(found)
    resumed = weights_after(again, world, 3, 5)
    return all(torch.equal(a, b) for a, b in zip(resumed, undisturbed, strict=True))


def test_a_compiled_run_resumed_ends_bit_for_bit_the_same(cache: Path, tmp_path: Path) -> None:
    assert spawn(disturbed_and_not, 2, cache, tmp_path / "saved") == [True, True]


def count_graphs(world: World, device: torch.device, cache: Path) -> tuple[int, float]:
    keep_in(cache)
    compiled, eager = (make_engine(world, device, with_train(compile=choice)) for choice in (True, False))
    take_steps(eager, world, 0, 2)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.compiler.set_stance("fail_on_recompile"):
        take_steps(compiled, world, 0, 1)
        compiled.predict(batch_of(9, world)[0])
    for count in (5, 1):  # the last batches of an evaluation
        compiled.predict(batch_of(9, world)[0][:count])
    with torch.compiler.set_stance("fail_on_recompile"):
        take_steps(compiled, world, 1, 2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    images, _ = batch_of(9, world)
    off = (compiled.predict(images) - eager.predict(images)).abs().max().item()
    return graphs, off


def test_all_layers_are_one_graph_and_nothing_is_compiled_again(cache: Path) -> None:
    graphs, off = spawn(count_graphs, 1, cache)[0]
    assert graphs == 2 * 3  # training and evaluation: what comes before the layers, a layer, what comes after
    assert off < 0.05  # Lion turns a gradient that is zero up to rounding into a whole step


def not_finite(
    world: World, device: torch.device, cache: Path, shards: Path
) -> tuple[str, str, bool, list[str], list[str]]:
    """What is said, also when rank 1 has lost its shards, whether the weights are as before, its samples, its log."""
    from crate_dist.training import finite
    from crate_dist.training.engine import NotFinite
    from crate_dist.training.finite import post_mortem

    keep_in(cache)
    engine = make_engine(world, device, with_train(compile=True))
    take_steps(engine, world, 0, 1)
    before = [part.clone() for part in engine.state()["fp32"]]
    with torch.no_grad():
        engine.module.layers[1].ista.dictionary[0, 0] = float("inf")
    with pytest.raises(NotFinite):
        take_steps(engine, world, 1, 2)
    with torch.no_grad():  # the ranks have gathered the weights again, which are those of before
        engine.module.layers[1].ista.dictionary[0, 0] = float("inf")
    index, share = ShardIndex.load(shards), Share(world.rank, 2, GLOBAL_BATCH, GLOBAL_BATCH // 2)
    order = Order(index.shard_sizes, seed=3)
    transform = train_transform(AugmentSection(), ImageSection(), 32)
    watchdog = Watchdog(world, 60, cache / "unused")
    logged: list[str] = []
    finite.logger.setLevel(logging.INFO)
    (handler := logging.Handler()).emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    finite.logger.addHandler(handler)
    said = str(post_mortem(engine, TrainLoader(index, order, share, transform, workers=0, step=1), 1, watchdog))
    if world.rank == 1:
        gone = shutil.copytree(shards, cache / "gone")
        lost = ShardIndex.load(gone)
        for tar in gone.glob("*.tar"):
            tar.unlink()
    there = index if world.rank == 0 else lost
    half = str(post_mortem(engine, TrainLoader(there, order, share, transform, workers=0, step=1), 1, watchdog))
    untouched = all(torch.equal(a, b) for a, b in zip(before, engine.state()["fp32"], strict=True))
    reader, samples = ShardReader(index), order.samples(share.positions(order, 1)).tolist()
    return said, half, untouched, [reader.describe(sample, "").key for sample in samples], logged


def test_the_layer_where_it_stopped_being_finite_is_found_behind_a_compiled_one(cache: Path, cast_shards: Path) -> None:
    for said, half, untouched, keys, logged in spawn(not_finite, 2, cache, cast_shards / "train"):
        assert "rank 0: the output of layers.1.ista" in said
        assert "rank 1: the output of layers.1.ista" in said
        assert all(key in logged[0] for key in keys)
        assert said.count(".tar:") == 3
        assert said.endswith(f" and {GLOBAL_BATCH - 3} more, in the logs of the ranks")
        assert "a smaller optim.grad_clip may help" in said
        assert "rank 0: the output of layers.1.ista" in half
        assert "rank 1: not known where, since its batch cannot be read again" in half
        assert untouched


def broken_compiler(world: World, device: torch.device, folder: Path) -> tuple[str, list[bool]]:
    import torch._inductor.config

    logging.basicConfig(filename=folder / str(world.rank), force=True, level=logging.WARNING)
    if world.rank == 1:  # on one rank alone: both must train without
        torch._inductor.config.cpp.cxx = ("/nonexistent/g++",)  # type: ignore[assignment]
        keep_in(folder / "empty")
    engine = make_engine(world, device, with_train(compile=True))
    plain = make_engine(world, device, with_train(compile=False))
    same = [
        torch.equal(a, b)
        for a, b in zip(weights_after(engine, world, 0, 2), weights_after(plain, world, 0, 2), strict=True)
    ]
    return (folder / str(world.rank)).read_text(), same


def test_where_one_rank_cannot_compile_none_does_and_one_line_says_so(tmp_path: Path) -> None:
    for log, same in spawn(broken_compiler, 2, tmp_path):
        assert log.count("torch.compile does not work here, training goes on without it (rank 1: ") == 1
        assert all(same)


def older_gpu(world: World, device: torch.device, folder: Path) -> tuple[list[bool], str]:
    """What both ranks are told to do, and say, where rank 1 has a GPU that is too old; nothing is computed on one."""
    logging.basicConfig(filename=folder / str(world.rank), force=True, level=logging.WARNING)
    torch.cuda.get_device_capability = lambda device=None: [(9, 0), (6, 1)][world.rank]
    gpu = torch.device("cuda")
    tries = compiling.should_compile("auto", gpu)
    compiles = compiling.compile_model(make_engine(world, device, with_train()).module, lambda: 1 / 0, gpu)
    return [tries, compiles], (folder / str(world.rank)).read_text()


def test_where_one_rank_has_an_older_gpu_all_agree_before_any_compiles(tmp_path: Path) -> None:
    for (tries, compiles), log in spawn(older_gpu, 2, tmp_path):
        assert tries
        assert not compiles
        assert "(rank 1: Triton needs a GPU of compute capability 7.0, and this one has 6.1)" in log


def the_family(world: World, device: torch.device) -> tuple[int, list[float]]:
    """Of ToST's training pass under autocast, and of CBT's layer: graphs, and how far its values are from eager."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # all but kernels
    sizes = {"width": 32, "heads": 2, "depth": 2, "image_size": 16, "patch_size": 4}
    model = build_model(ModelSection(arch="tost_tiny_12", **sizes), 7, seed=0)
    model.set_execution(autocast=True, images=4, group=2)
    images, keep = batch_of(0, world)[0][:4, :16, :16].permute(0, 3, 1, 2) / 128 - 1, torch.tensor([0.0, 2.0, 2.0, 0.0])

    def values() -> list[torch.Tensor]:
        logits = model(images, keep.expand(4, -1)).float()
        gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        seen = statistics(model)
        take_statistics(model, torch.zeros_like(seen))
        return [logits.detach(), *gradients, seen]

    eager = values()
    assert compiling.compile_model(model, values, device)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.compiler.set_stance("fail_on_recompile"):
        off = [distance(a, b) for a, b in zip(values(), eager, strict=True)]
    layer, z = build_model(ModelSection(arch="cbt_tiny", **sizes), 7, seed=0).layers[0], torch.randn(4, 17, 32)
    exact = layer(z, keep.expand(2, -1))
    layer.compile(dynamic=False, fullgraph=True)
    return graphs, [*off, distance(layer(z, keep.expand(2, -1)), exact)]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm().clamp(min=1e-3))


def test_what_the_family_has_beside_crate_is_compiled_whole_once_and_computes_the_same() -> None:
    [(graphs, off)] = spawn(the_family, 1)
    assert graphs == 3 + 1  # under autocast the first layer of ToST reads bf16 tokens, and the others fp32
    assert max(off) < 2e-2


def golden_outputs(world: World, device: torch.device, cache: Path) -> float:
    from crate_dist.models.config import ModelConfig
    from crate_dist.models.transformer import Transformer
    from crate_dist.models.weights.names import from_reference

    keep_in(cache)
    golden = torch.load(GOLDEN, weights_only=True)
    model = Transformer(ModelConfig(**{key: value for key, value in golden["config"].items() if key != "dim_head"}))
    model.load_state_dict(from_reference(golden["state_dict"]))
    images = golden["images"]
    assert compiling.compile_model(model, lambda: model(images), device)
    return (model(images) - golden["logits"]).abs().max().item()


def test_compiled_logits_equal_the_published_codes(cache: Path) -> None:
    assert spawn(golden_outputs, 1, cache)[0] < 1e-5


def test_auto_leaves_a_cpu_alone() -> None:
    cpu = torch.device("cpu")
    assert [compiling.should_compile(choice, cpu) for choice in ("auto", True, False)] == [False, True, False]


def compiled_lion(world: World, device: torch.device, cache: Path) -> tuple[float, int]:
    keep_in(cache)
    both = []
    for compiled in (True, False):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 5000))
        optimizer = Lion([weight], lr=1e-3, weight_decay=0.1)
        optimizer.grad_scale = torch.tensor(3.0)
        if compiled:
            optimizer.compile()
        for step in range(4):
            optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)
            weight.grad = torch.sin(torch.arange(5000.0) * (step + 1))
            optimizer.step()
        both.append(weight.detach())
    return (both[0] - both[1]).abs().max().item(), torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_a_compiled_lion_is_lion_and_a_new_rate_compiles_nothing_again(cache: Path) -> None:
    off, graphs = spawn(compiled_lion, 1, cache)[0]
    assert off < 1e-6
    assert graphs == 1


def recomputed(world: World, device: torch.device) -> list[bool]:
    plain, again = (make_engine(world, device, with_train(recompute=count)) for count in (0, 3))
    return [
        torch.equal(a, b)
        for a, b in zip(weights_after(plain, world, 0, 3), weights_after(again, world, 0, 3), strict=True)
    ]


def test_layers_that_are_computed_again_give_the_same_weights_bit_for_bit() -> None:
    assert spawn(recomputed, 1) == [[True]]


def losses_of(world: World, device: torch.device, cache: Path) -> list[list[float]]:
    """Of fp32, eager, and of bf16 and autocast, compiled, on images of four colours."""
    keep_in(cache)
    curves = []
    for train in (
        {"precision": "fp32"},
        {"precision": "bf16", "compile": True},
        {"precision": "autocast", "compile": True},
    ):
        engine = make_engine(world, device, with_train(**train))
        losses = []
        for step in range(40):
            labels = torch.arange(GLOBAL_BATCH) % 4
            images = batch_of(step % 5, world)[0] // 2
            images[torch.arange(GLOBAL_BATCH), :, :, labels.clamp(max=2)] += (labels < 3).byte()[:, None, None] * 60
            losses.append(engine.step(iter([(images, labels)]), 3e-4, step).loss.item())
        curves.append(losses)
    return curves


def test_the_compiled_bf16_step_learns_what_the_exact_one_learns(cache: Path) -> None:
    exact, *fast = (torch.tensor(losses) for losses in spawn(losses_of, 1, cache)[0])
    assert exact[-5:].mean() < exact[:5].mean() - 0.2
    for losses in fast:
        off = losses - exact
        assert off.abs().max() < 0.1
        assert off[0].abs() > 1e-5, "no product was bf16: fp32, compiled, is some 1e-6 off at the first step"
        assert all(abs(quarter.mean()) < 0.05 for quarter in off.chunk(4))


def kept(world: World, device: torch.device, cache: Path, folder: Path) -> tuple[bool, int]:
    """Whether something was loaded, and how many graphs torch then found compiled."""
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
    os.environ["XDG_CACHE_HOME"] = str(folder / "home")
    compiled = CompiledCache(folder, world, device)
    keep_in(cache)
    loaded = compiled.load()
    weight = torch.ones(8, requires_grad=True)
    torch.compile(lambda x: (x * weight).relu().sum())(torch.ones(4, 8)).backward()
    compiled.save(ALONE)
    return loaded, torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"]


def test_a_restart_elsewhere_finds_what_was_compiled_unless_another_user_signed_it(tmp_path: Path) -> None:
    assert spawn(kept, 1, tmp_path / "one", tmp_path) == [(False, 0)]
    [file] = (path for path in tmp_path.iterdir() if path.is_file())
    assert spawn(kept, 1, tmp_path / "another", tmp_path) == [(True, 1)]
    content = file.read_bytes()
    file.write_bytes(bytes(32) + content[32:])
    assert not CompiledCache(tmp_path, World(0, 1, 0, 1, "127.0.0.1", 29500, "alone"), torch.device("cpu")).load()


def test_what_a_machine_lacks_is_said_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(compiling.CannotCompile, match="no gcc and no clang"):
        compiling._check_tools(torch.device("cuda"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "/nonexistent")
    with pytest.raises(compiling.CannotCompile, match=r"no Python\.h in /nonexistent"):
        compiling._check_tools(torch.device("cpu"))


def test_compiling_ends_at_its_limit() -> None:
    with pytest.raises(compiling.CannotCompile, match="not compiled within 0 s"), compiling._limited(0.01):
        subprocess.run(["sleep", "60"])
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


WHOLE_RUN = """
import sys, torch
from crate_dist.train import main
from crate_dist.training import compiling
from crate_dist.training.engine import Engine

compile_model, eagerly, predict, eager, batches = compiling.compile_model, compiling.eagerly, Engine.predict, [], []

def predict_and_note(engine, images):
    before = len(eager)
    logits = predict(engine, images)
    batches.append((len(images), len(eager) > before))
    return logits

def compile_once(*arguments):
    done = compile_model(*arguments)
    torch.compiler.set_stance("fail_on_recompile")
    batches.clear()
    return done

if __name__ == "__main__":
    compiling.compile_model, Engine.predict = compile_once, predict_and_note
    compiling.eagerly = lambda: (eager.append(1), eagerly())[1]
    status = main(sys.argv[1:])
    print(torch._dynamo.utils.counters["stats"]["unique_graphs"], "graphs")
    print("batches of", *sorted(set(batches)))
    sys.exit(status)
"""


def test_a_whole_run_compiles_nothing_after_its_start(tmp_path: Path, cast_shards: Path, small_recipe: Path) -> None:
    (tmp_path / "run.py").write_text(WHOLE_RUN)
    settings = [
        "train.compile=true",
        "train.max_steps=4",
        "train.micro_batch=48",
        "log.eval_every_epochs=1",
        "log.whitebox_every_steps=2",
    ]
    settings += ["mix.mixup=0.8", "mix.cutmix=1.0", "train.group=3", "model.drop_path=0.2"]
    arguments = ["--config", small_recipe, "--data", cast_shards, "--run-dir", tmp_path / "run"]
    arguments += [word for setting in settings for word in ("--set", setting)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "home"), "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(
        [sys.executable, tmp_path / "run.py", *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "6 graphs" in ended.stdout
    # 37 images, by the micro-batch that was derived, of which all but the last batch are whole.
    assert "batches of (13, True) (24, False)" in ended.stdout, ended.stdout
    log = RunFolder(tmp_path / "run").log_file(0).read_text()
    assert len(compiled_seconds(log)) == 1  # as the doctor reads it
    written = [json.loads(line) for line in RunFolder(tmp_path / "run").metrics.read_text().splitlines()]
    assert {"val/top1", "whitebox/zeros", "train/loss"} <= {key for line in written for key in line}
    assert [path.name for path in (tmp_path / "run" / "compiled").iterdir()] == ["cpu-0.signed"]
