"""Gradients on their way to their owners: what the host waits for, the order on the device, and steps not taken."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crate_dist.checkpoint.format import CheckpointError, Progress
from crate_dist.checkpoint.loading import open_checkpoint
from crate_dist.checkpoint.saving import publish
from crate_dist.config import Recipe, load_recipe
from crate_dist.doctor import fake_cluster as fake
from crate_dist.doctor.fake_cluster import counted, fake_cluster
from crate_dist.models.build import build_model
from crate_dist.training.engine import Engine, NotFinite, WeightsNotFinite
from crate_dist.world import World
from tests.conftest import SMALL_RECIPE
from tests.ranks import REPOSITORY, spawn

CPU = torch.device("cpu")
ADAMW = {"optim__name": "adamw", "optim__decay": "matrices"}
ACCUMULATION = 2


def recipe_for(ranks: int, arch: str = "demo", **settings: object) -> Recipe:
    given = {"train.global_batch": ACCUMULATION * ranks, "model.image_size": 32, "model.patch_size": 16} | {
        name.replace("__", "."): value for name, value in settings.items()
    }
    return load_recipe(arch, [f"{name}={value}" for name, value in given.items()])


def engine_on(recipe: Recipe) -> Engine:
    return Engine(build_model(recipe.model, 10, seed=0), recipe, CPU, 1, ACCUMULATION)


def batches(step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    for _ in range(ACCUMULATION):
        yield torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8, generator=generator), torch.tensor([step % 10])


def copies(engine: Engine) -> list[torch.Tensor]:
    """Everything that a step changes."""
    owned = [tensor for kind in engine.state().values() for tensor in kind]
    owned += [value for state in engine._zero.optimizer.state.values() for value in state.values()]
    return [tensor.clone() for tensor in [*owned, *engine.module.parameters()]]


def equal(these: list[torch.Tensor], those: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


@pytest.mark.parametrize("ranks", [8, 32, 128])
def test_a_step_of_crate_b_waits_once_and_for_the_step_before(ranks: int) -> None:
    with fake_cluster(ranks, rank=3):
        engine = engine_on(recipe_for(ranks, "crate_base"))
        engine.step(batches(0), 1e-4, 0)
        with counted() as found:
            engine.step(batches(1), 1e-4, 1)
    assert found.waits == {"event": 1}


def test_how_long_a_rank_was_by_itself_is_known_without_waiting() -> None:
    with fake_cluster(4):
        engine = engine_on(recipe_for(4))
        loss, began = engine.criterion, time.perf_counter()

        def slow(*given: Any) -> torch.Tensor:
            time.sleep(0.05)
            return loss(*given)

        with patch.object(engine, "criterion", slow), counted() as found:
            engine.step(batches(0), 1e-4, 0)
            own_s = engine.own_s()
        assert ACCUMULATION * 0.05 <= own_s < time.perf_counter() - began
        assert engine.own_s() == 0
    assert not found.waits


@pytest.mark.parametrize("settings", [{"train__precision": "fp32"}, ADAMW])
def test_other_precisions_and_optimizers_wait_as_little(settings: dict[str, Any]) -> None:
    with fake_cluster(4):
        engine = engine_on(recipe_for(4, **settings))
        with counted() as found:
            for step in range(3):
                engine.step(batches(step), 1e-4, step)
    assert found.waits == {"event": 2}


@pytest.mark.parametrize("name", ["lion", "adamw"])
def test_each_layer_moves_at_its_own_rate_and_decays_by_its_rule(name: str) -> None:
    """The first step of either is the rate times the sign of the gradient, whatever that is; Lion's takes all."""
    given: dict[str, Any] = {
        "optim__name": name,
        "optim__weight_decay": 0.5,
        "optim__decay": "kernels",
        "optim__layer_decay": 0.5,
    }
    with fake_cluster(1):
        engine = engine_on(recipe_for(1, train__precision="fp32", **given))
        before = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
        engine.step(batches(0), 1e-3, 0)
        after, depth = dict(engine.module.named_parameters()), engine.module.config.depth
    factors = {
        "head.linear.weight": 1.0,
        "patch_embed.proj.weight": 0.5 ** (depth + 1),
        "cls_token": 0.5 ** (depth + 1),
    }
    factors |= {
        f"layers.{n}.{p}": 0.5 ** (depth - n) for n in range(depth) for p in ("ista.dictionary", "mssa.out.weight")
    }
    for parameter, factor in factors.items():
        decay = 0.5 if parameter.endswith("weight") else 0.0
        moved = after[parameter] - before[parameter] * (1 - 1e-3 * factor * decay)
        assert moved.abs().max().item() == pytest.approx(1e-3 * factor, rel=1e-3)


def test_a_checkpoint_of_another_layer_decay_is_refused_with_the_setting_s_name(tmp_path: Path) -> None:
    with fake_cluster(1):
        engine = engine_on(recipe_for(1, optim__layer_decay=0.5))
        publish(tmp_path, engine.state(), engine.layouts, Progress(step=0), World(0, 1, 0, 1, "", 0, "test"))
        other = engine_on(recipe_for(1))
        with pytest.raises(CheckpointError, match=r"groups the parameters otherwise, as another .* optim.layer_decay"):
            other.partitions.load(open_checkpoint(tmp_path / "step-00000000"))


def test_what_the_host_looks_at_is_counted() -> None:
    with fake_cluster(2), counted() as found:
        bool(torch.ones(()) > 0)
        torch.ones(3).nonzero()
        fake.get_accelerator().synchronize()
        torch.distributed.all_reduce(torch.ones(100))
    assert found.waits == {"value": 2, "device": 1}
    assert found.kinds() == {"all_reduce": 1}
    assert found.messages[0].sent == 400


@pytest.mark.parametrize(
    ("ranks", "settings", "most"),
    [(8, {}, 8 + 8), (128, {}, 8), (8, {"optim__decay": "weights", "optim__layer_decay": 0.75}, 2 * (12 + 2))],
)
def test_every_gradient_is_sent_once_per_micro_batch_in_few_messages(
    ranks: int, settings: dict[str, Any], most: int
) -> None:
    with fake_cluster(ranks):
        engine = engine_on(recipe_for(ranks, "crate_base", **settings))
        with counted() as found:
            engine.step(batches(0), 1e-4, 0)
        parameters = sum(p.numel() for p in engine.module.parameters())
    reductions = [message for message in found.messages if "reduce" in message.kind and message.bytes > 64]
    assert sum(message.bytes for message in reductions) == ACCUMULATION * 2 * parameters
    assert len(reductions) <= ACCUMULATION * most


class Late(TorchDispatchMode):
    """Holds what is given to a stream back until somebody waits for that stream: as late as a device may be."""

    def __init__(self, work: list[Callable[[], object]]) -> None:
        super().__init__()
        self._work = work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "aten" or not func.__name__.split(".")[0].endswith("_"):  # a collective; a view
            return func(*args, **(kwargs or {}))
        self._work.append(lambda: func(*args, **(kwargs or {})))
        return args[0]


class LateStream(fake.CpuStream):
    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []

    def wait_stream(self, other: fake.CpuStream) -> None:
        assert isinstance(other, LateStream)
        while other.work:
            other.work.pop(0)()

    def wait_event(self, event: fake.CpuEvent) -> None:
        assert isinstance(event, LateEvent)
        while event.last in event.stream.work:
            event.stream.work.pop(0)()


class LateEvent(fake.CpuEvent):
    def record(self, stream: fake.CpuStream | None = None) -> None:
        if stream is not None:
            assert isinstance(stream, LateStream)
            self.stream, self.last = stream, stream.work[-1]


class LateDevice(fake.WithStreams):
    """An accelerator whose streams, but the first, do nothing before they are waited for."""

    Stream, Event = LateStream, LateEvent

    def __init__(self) -> None:
        super().__init__()
        self._current = self._default = LateStream()

    @contextlib.contextmanager
    def stream(self, stream: fake.CpuStream) -> Iterator[None]:
        assert isinstance(stream, LateStream)
        with Late(stream.work):
            yield


def trained(accelerator: type, ranks: int) -> list[torch.Tensor]:
    with patch.object(fake, "WithStreams", accelerator), fake_cluster(ranks, rank=1):
        engine = engine_on(recipe_for(ranks, train__precision="fp32"))
        for step in range(3):
            engine.step(batches(step), 1e-3, step)
        return copies(engine)


def test_a_reduction_that_comes_as_late_as_it_may_changes_no_weight() -> None:
    assert equal(trained(LateDevice, 4), trained(fake.WithStreams, 4))


@pytest.mark.parametrize("optim", [{"optim__name": "lion", "optim__ema_decay": 0.9}, ADAMW], ids=str)
def test_a_step_that_is_not_finite_and_all_after_it_change_nothing_and_it_is_named(optim: dict[str, Any]) -> None:
    with fake_cluster(1):
        engine = engine_on(recipe_for(1, **optim))
        for step in range(3):
            engine.step(batches(step), 1e-3, step)
        engine.module.get_parameter("layers.1.ista.dictionary").data[0, 0] = float("inf")
        before = copies(engine)
        result = engine.step(batches(3), 1e-3, 3)  # the host does not know yet
        assert not torch.isfinite(result.grad_norm)
        with pytest.raises(NotFinite) as raised:
            engine.step(batches(4), 1e-3, 4)
        assert raised.value.step == 3
        with pytest.raises(NotFinite):
            engine.check()
        engine._guard._noted.clear()
        assert equal(copies(engine), before)


def test_nothing_is_predicted_or_saved_after_a_step_that_is_not_finite() -> None:
    for use in (lambda engine: engine.state(), lambda engine: engine.predict(next(batches(0))[0]), Engine.check):
        with fake_cluster(4):
            engine = engine_on(recipe_for(4))
            engine.module.get_parameter("layers.1.ista.dictionary").data[0, 0] = float("nan")
            engine.step(batches(0), 1e-3, 0)
            with pytest.raises(NotFinite) as raised:
                use(engine)
            assert raised.value.step == 0


def test_a_parameter_that_a_loss_does_not_depend_on_has_no_gradient_left_from_before() -> None:
    with fake_cluster(1):
        engine = engine_on(recipe_for(1, train__precision="fp32"))
        engine.step(batches(0), 1e-3, 0)
        momentum = engine.state()["exp_avg"][0].clone()
        first = next(engine.module.parameters())
        engine.criterion = lambda logits, labels: first.sum()  # type: ignore[method-assign]
        engine.step(batches(1), 1e-3, 1)
        after = engine.state()["exp_avg"][0]
    names = engine.layouts[0].names
    assert names[0] == next(name for name, _ in engine.module.named_parameters())
    assert not torch.equal(after[: first.numel()], 0.99 * momentum[: first.numel()])
    assert torch.equal(after[first.numel() :], 0.99 * momentum[first.numel() :])


def groups_and_timeouts(world: World, device: torch.device) -> tuple[int, list[float]]:
    engine = engine_on(recipe_for(world.world_size))
    used = (engine._zero.dp_process_group, torch.distributed.group.WORLD)
    options = [group._get_backend(device).options for group in used if group is not None]
    return len(torch.distributed.distributed_c10d._world.pg_map), [o._timeout.total_seconds() for o in options]


@pytest.mark.spawn
def test_the_engine_makes_no_process_group_with_a_time_out_of_its_own() -> None:
    for groups, (engines, ours) in spawn(groups_and_timeouts, 2):
        assert groups == 1
        assert engines == ours == 1800


LOOK = """
import sys
started = []
names = ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.fork", "os.forkpty", "os.system")
sys.addaudithook(lambda event, given: started.append((event, given)) if event in names else None)
from crate_dist.doctor.fake_cluster import fake_cluster
from tests.training.test_zero import engine_on, recipe_for
with fake_cluster(2):
    engine_on(recipe_for(2))
print(started, "torch._dynamo" in sys.modules)
"""


def test_making_an_engine_starts_no_process_and_neither_imports_nor_looks_for_a_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", LOOK], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["[] False"], done.stderr
    assert "nvcc" not in done.stderr
    assert "CUDA_HOME" not in done.stderr


LATE = """
import sys
from crate_dist.doctor.fake_cluster import streams
from crate_dist import train
with streams():
    sys.exit(train.main(sys.argv[1:]))
"""


def test_a_run_on_a_device_with_streams_names_the_step_that_was_not_finite_one_step_later(
    cast_shards: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "small.toml"
    recipe.write_text(SMALL_RECIPE)
    arguments = ["--config", recipe, "--data", cast_shards, "--run-dir", tmp_path / "run", "--set", "optim.lr=1e30"]
    arguments += ["--set", "optim.warmup_epochs=0", "--set", "log.every_steps=100"]
    arguments += ["--set", "checkpoint.every_steps=100"]
    done = subprocess.run(
        [sys.executable, "-c", LATE, *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "step 2, not finite: rank 0: the output of" in done.stderr
    assert "train-00000" in done.stderr


STEP_S = 1.0
SLOW = f"""
import sys, time
from unittest.mock import patch
from crate_dist import train
from crate_dist.doctor import fake_cluster as fake

class SlowEvent(fake.CpuEvent):
    through = 0.0

    def __init__(self, enable_timing=False, **given):
        if enable_timing:
            self.record = lambda: None

    def record(self, stream=None):
        SlowEvent.through = self.done = max(SlowEvent.through, time.monotonic()) + {STEP_S}

    def synchronize(self):
        time.sleep(max(0.0, self.done - time.monotonic()))

with patch.object(fake.WithStreams, "Event", SlowEvent), fake.streams():
    sys.exit(train.main(sys.argv[1:]))
"""


def test_the_speed_that_is_reported_is_the_devices_and_not_the_hosts(cast_shards: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "small.toml"
    recipe.write_text(SMALL_RECIPE)
    arguments = ["--config", recipe, "--data", cast_shards, "--run-dir", tmp_path / "run", "--set", "log.every_steps=1"]
    arguments += ["--set", "train.max_steps=3", "--set", "train.global_batch=20"]
    subprocess.run([sys.executable, "-c", SLOW, *map(str, arguments)], cwd=REPOSITORY, check=True, timeout=120)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["speed/images_per_s"] for line in lines if "speed/images_per_s" in line]
    assert len(rates) == 3
    assert max(rates) < 1.05 * 20 / STEP_S


def test_weights_that_a_step_has_made_no_numbers_are_found_before_anything_is_made_of_them() -> None:
    with fake_cluster(8):
        engine = engine_on(recipe_for(8))
        engine.step(batches(0), 1e-4, 0)
        engine.partitions.weights[0].data[5] = torch.nan
        for use in (Engine.check, Engine.state):
            with pytest.raises(WeightsNotFinite, match=r"optim\.eps"):
                use(engine)


def test_a_loss_that_is_not_finite_stops_the_step_though_its_gradients_are() -> None:
    with fake_cluster(8):
        engine = engine_on(recipe_for(8))
        engine.step(batches(0), 1e-3, 0)
        before, loss = copies(engine), engine.criterion
        with patch.object(engine, "criterion", lambda *given: loss(*given) + torch.inf):
            engine.step(batches(1), 1e-3, 1)
        with pytest.raises(NotFinite) as raised:
            engine.check()
        assert raised.value.step == 1
        assert equal(copies(engine), before)
