"""On a GPU nothing meets a tensor of the CPU's, and the host does not wait once per batch. Seen without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed import fake_pg

from crate_dist.config import ModelSection
from crate_dist.data.loader import Batch, Normalize
from crate_dist.evaluation import knn
from crate_dist.evaluation import linear as linear_probe
from crate_dist.evaluation.accuracy import ClassCounts, evaluate
from crate_dist.evaluation.features import Features, extract, pooled
from crate_dist.models.build import build_model
from tests.pretended_gpu import DEVICE, PretendedGpu, at_once, pretended_gpu, streams_of

RANK, RANKS, CLASSES, WIDTH = 1, 3, 10, 12
COUNT = 40


@contextmanager
def ranks(rank: int, world_size: int) -> Iterator[None]:
    """A process group whose collectives do nothing."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=fake_pg.FakeStore())
    yield
    dist.destroy_process_group()


class Answers(TorchFunctionMode):
    """Answers where the host asks for values, which fake tensors have not. asked: how, and of how many numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, of = func.__name__, args[0] if args else None
        if name == "pin_memory":
            return of  # no allocator of such memory is there
        if name in ("tolist", "item", "__int__", "__float__", "__bool__", "__index__", "numpy", "__array__"):
            assert isinstance(of, torch.Tensor)
            self.asked.append((name, of.numel()))
            zeros = np.zeros(tuple(of.shape), dtype=np.int64 if not of.is_floating_point() else np.float64)
            return {"tolist": zeros.tolist, "__int__": lambda: 0, "__float__": lambda: 0.0, "item": lambda: 0}.get(
                name, (lambda: False) if name == "__bool__" else lambda: zeros
            )()
        return func(*args, **(kwargs or {}))

    def of_the_device(self) -> list[tuple[str, int]]:
        return self.asked


@pytest.fixture
def asked() -> Iterator[list[tuple[str, int]]]:
    """Where a tensor on the GPU is one by its type: what mixes it with the CPU's raises, as CUDA does."""
    gpu, answers = PretendedGpu(at_once), Answers()
    with ranks(RANK, RANKS), streams_of(gpu), FakeTensorMode(), answers:
        yield answers.asked


def batches(count: int, each: int = 5) -> Iterator[Batch]:
    for _ in range(count):
        yield Batch(torch.zeros(each, 32, 32, 3, dtype=torch.uint8), torch.zeros(each, dtype=torch.int64))


def on_the_gpu() -> tuple[Any, Normalize]:
    net = build_model(ModelSection(arch="crate_demo", image_size=32, patch_size=8), CLASSES, seed=3).to(DEVICE)
    net.set_execution(autocast=True)
    return net.eval(), Normalize((0.5,) * 3, (0.5,) * 3, DEVICE, torch.float32)


def features(count: int) -> Features:
    sizes = tuple(b - a for a, b in pairwise(count * r // RANKS for r in range(RANKS + 1)))
    mine = sizes[RANK]
    return Features(torch.zeros(mine, WIDTH, device=DEVICE), torch.zeros(mine, dtype=torch.int64, device=DEVICE), sizes)


@pytest.mark.parametrize("count", [1, 6])
def test_an_evaluation_looks_at_the_device_once(asked: list[tuple[str, int]], count: int) -> None:
    net, normalize = on_the_gpu()
    tally = ClassCounts(CLASSES, DEVICE)
    with pytest.raises(ZeroDivisionError):  # of no samples, as the answers are
        evaluate(lambda images: net(normalize(images)), batches(count), DEVICE, tally)
    assert asked == [("tolist", 6)]


@pytest.mark.parametrize("count", [1, 6])
def test_the_extraction_of_features_looks_at_the_device_at_its_end_alone(
    asked: list[tuple[str, int]], count: int
) -> None:
    net, normalize = on_the_gpu()
    found = extract(
        lambda images: pooled(net, normalize(images), 2, "mean"),
        batches(count),
        net.config.dim,
        RANKS * 5 * count,
        DEVICE,
    )
    assert found.values.device == found.labels.device == DEVICE
    assert asked == [("__int__", 1)] * 2


def test_neighbours_are_sought_on_the_device(asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "QUERIES", 7)
    monkeypatch.setattr(knn, "BANK", 9)
    bank, queries = features(100), features(COUNT)
    best = knn.merged(knn.nearest(bank.values, queries.values, 20, bank.first))
    assert best.device == DEVICE
    results = knn.classify(bank, queries, [3, 20])
    assert [found.k for found in results] == [3, 20]


def test_a_linear_classifier_is_fitted_on_the_device(asked: list[tuple[str, int]]) -> None:
    train = features(100)
    fitted = linear_probe.fit(train, torch.ones_like(train.labels, dtype=torch.bool), 1, 0.1, max_steps=5)
    assert fitted.weight.device == fitted.mean.device == DEVICE
    again = linear_probe.fit(train, linear_probe.held_out(train, 0), 1, 0.1, max_steps=5, start=fitted)
    with pytest.raises(ZeroDivisionError):
        linear_probe.accuracy(again, train, linear_probe.held_out(train, 0))


def test_an_evaluation_on_a_gpu_counts_what_one_on_a_cpu_does() -> None:
    rng = torch.Generator().manual_seed(0)
    made = [
        Batch(
            torch.randint(0, 256, (each, 4, 4, 3), dtype=torch.uint8, generator=rng),
            torch.randint(0, CLASSES, (each,), generator=rng),
        )
        for each in (8, 8, 8, 8, 3)
    ]
    weight = torch.randn(48, CLASSES, generator=rng)

    def predict(images: torch.Tensor) -> torch.Tensor:
        return images.float().flatten(1) @ weight

    with ranks(0, 1):
        expected = evaluate(predict, made, torch.device("cpu"))
        with pretended_gpu() as gpu:
            assert evaluate(predict, made, DEVICE) == expected
        waits = gpu.blocking
        with pretended_gpu() as gpu:
            evaluate(predict, made[:1], DEVICE)
        assert gpu.blocking == waits
