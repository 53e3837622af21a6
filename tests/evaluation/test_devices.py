"""On a GPU nothing meets a tensor of the CPU's, and the host does not wait for every batch. Seen without a GPU.

The device is torch's `meta`: operations on it give shapes and no values, and take none of the CPU's tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed import fake_pg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from crate_dist.config import ModelSection
from crate_dist.data.loader import Batch, Normalize
from crate_dist.evaluation import knn
from crate_dist.evaluation import linear as linear_probe
from crate_dist.evaluation.accuracy import ClassCounts, evaluate
from crate_dist.evaluation.features import Features, extract, gather_features, pooled
from crate_dist.models.build import build_model
from tests.pretended_gpu import DEVICE, pretended_gpu

META, CPU = torch.device("meta"), torch.device("cpu")
RANK, RANKS, CLASSES, WIDTH = 1, 3, 10, 12


class Waits(TorchFunctionMode):
    """Answers with zeros when the host looks at values of the device.

    looked: how, and at how many numbers; also how many it made there of Python's
    """

    def __init__(self) -> None:
        super().__init__()
        self.looked: list[tuple[str, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if (
            name in ("cpu", "tolist", "item", "__int__", "__float__", "__bool__", "numpy")
            and (of := args[0]).device == META
        ):
            self.looked.append((name, of.numel()))
            args = (torch.zeros(of.shape, dtype=of.dtype), *args[1:])
        result = func(*args, **(kwargs or {}))
        if name in ("tensor", "as_tensor") and result.device == META:
            self.looked.append((name, result.numel()))
        return result


class Apart(TorchDispatchMode):
    """Lets no operation have tensors of both devices, but for single numbers, as CUDA does.

    brought: numbers in each copy from the CPU to the device, for which the host waits
    """

    def __init__(self) -> None:
        super().__init__()
        self.brought: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {thing.device for thing in tree_iter((args, kwargs)) if isinstance(thing, Tensor) and thing.dim()}
        if devices == {CPU} and isinstance(result, Tensor) and result.device == META:
            self.brought.append(result.numel())
        else:
            assert len(devices) < 2, f"{func} of tensors on {devices}"
        return result


@contextmanager
def ranks(rank: int, world_size: int) -> Iterator[None]:
    """This process as one of several ranks, whose collectives change nothing."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=fake_pg.FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[tuple[str, int]], list[int]]]:
    """Looks at the device, and copies to it, while a test runs. What ranks hand to nccl must be on the device."""

    def collective(*given: Tensor | list[Tensor]) -> None:
        assert all(tensor.device == META for tensor in tree_iter(given))

    for name in ("all_reduce", "all_gather"):
        monkeypatch.setattr(dist, name, collective)
    with ranks(RANK, RANKS), Waits() as looks, Apart() as copies:
        yield looks.looked, copies.brought


def batches(count: int, each: int = 5) -> Iterator[Batch]:
    for _ in range(count):
        images = torch.empty(each, 32, 32, 3, dtype=torch.uint8, device=META)
        yield Batch(images, torch.empty(each, dtype=torch.int64, device=META))


def on_the_device(precision: torch.dtype) -> tuple[Any, Normalize]:
    net = build_model(ModelSection(arch="crate_demo", image_size=32, patch_size=8), CLASSES, seed=3)
    return net.to(META, precision).eval(), Normalize((0.5,) * 3, (0.5,) * 3, META, precision)


def features(count: int) -> Features:
    sizes = tuple(stop - first for first, stop in pairwise(count * r // RANKS for r in range(RANKS + 1)))
    mine = sizes[RANK]
    return Features(torch.empty(mine, WIDTH, device=META), torch.empty(mine, dtype=torch.int64, device=META), sizes)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_an_evaluation_waits_for_the_device_at_its_end_alone(waits: Any, precision: torch.dtype) -> None:
    (looked, brought), (net, normalize) = waits, on_the_device(precision)
    tally = ClassCounts(CLASSES, META)
    looked.clear()
    brought.clear()
    with pytest.raises(ZeroDivisionError):  # no sample, as the answers are
        evaluate(lambda images: net(normalize(images)), batches(6), META, [tally])
    assert (looked, brought) == ([("tensor", 3), ("tolist", 6)], [])


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_extraction_of_features_waits_for_the_device_at_its_end_alone(waits: Any, precision: torch.dtype) -> None:
    (looked, brought), (net, normalize) = waits, on_the_device(precision)

    def read(images: Tensor) -> Tensor:
        return pooled(net, normalize(images), 2, "mean")

    looked.clear()
    brought.clear()
    found = extract(read, batches(6), net.config.dim, RANKS * 5 * 6, META)
    assert found.values.device == found.labels.device == META
    assert found.values.dtype == torch.float32
    assert (looked, brought) == ([("tensor", 1), ("__int__", 1), ("__int__", 1)], [])


def test_neighbours_are_sought_on_the_device_and_vote_on_the_host(waits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def voted(best: Tensor, labels: Tensor, right: Tensor, *_: Any) -> Tensor:
        assert {best.device.type, labels.device.type, right.device.type} == {"cpu"}
        return torch.ones(2, 2, dtype=torch.int64)

    monkeypatch.setattr(knn, "QUERIES", 7)
    monkeypatch.setattr(knn, "BANK", 9)
    monkeypatch.setattr(knn, "voted", voted)
    (looked, brought), bank, queries = waits, features(100), features(40)
    assert gather_features(bank.values, bank.sizes).shape == (100, WIDTH)
    assert [found.k for found in knn.classify(bank, queries, [3, 20])] == [3, 20]
    mine = [("cpu", 7 * 20)] * 2  # of six parts of the queries
    assert looked == [("cpu", 100), ("cpu", 40), *mine, ("tolist", 4)]
    assert brought == [4]


def test_a_linear_classifier_is_fitted_on_the_device(waits: Any) -> None:
    train, classes = features(100), 4
    every = torch.ones_like(train.labels, dtype=torch.bool)
    fitted = linear_probe.fit(train, every, classes, 0.1, max_steps=5)
    assert {part.device for part in (fitted.weight, fitted.bias, fitted.mean, fitted.scale)} == {META}
    held = linear_probe.held_out(train, 0)
    again = linear_probe.fit(train, ~held, classes, 0.1, max_steps=5, start=fitted)
    with pytest.raises(ZeroDivisionError):
        linear_probe.accuracy(again, train, held)


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
        assert gpu.blocking == ["tensor", "tolist"]
