"""No part of the mathematics mixes devices: it is computed with tensors that are nowhere, beside those of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from crate_dist.data.loader import Normalize
from crate_dist.evaluation.knn import nearest
from crate_dist.models.config import ModelConfig
from crate_dist.models.kernels import choose_kernels
from crate_dist.models.transformer import Transformer
from crate_dist.training.lion import Lion
from crate_dist.whitebox.maps import patch_keys, token_maps
from crate_dist.whitebox.measures import layer_gradient_norms, profile

CONFIG = ModelConfig(image_size=16, patch_size=4, num_classes=7, dim=24, depth=3, heads=3)
DEVICE = torch.device("meta")


class Fetches(TorchDispatchMode):
    """Lets a tensor that is nowhere be brought to the CPU, as one of a GPU may be; what it holds there is anything."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return op(*args, **kwargs)


@pytest.fixture
def model() -> Iterator[Transformer]:
    with DEVICE:
        model = Transformer(CONFIG).eval()
    with Fetches():
        yield model


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("images", [1, 8])  # ISTA in two products, in one
def test_an_evaluation_is_computed_where_the_model_is(model: Transformer, dtype: torch.dtype, images: int) -> None:
    model.to(dtype).set_execution(images=images)
    pixels = torch.zeros(images, 16, 16, 3, dtype=torch.uint8)
    logits = model(Normalize((0.5,) * 3, (0.2,) * 3, DEVICE, dtype)(pixels))
    assert logits.is_meta
    assert logits.shape == (images, 7)


def test_what_is_fp32_is_rounded_to_tf32_neither_by_products_nor_by_convolutions() -> None:
    torch.backends.cudnn.allow_tf32 = True  # torch's default
    choose_kernels()
    choose_kernels()  # as a process does that makes several engines
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_white_box_and_neighbours_too(model: Transformer) -> None:
    images = torch.empty(2, 3, 24, 16, device=DEVICE)  # of another size: positions are interpolated
    assert profile(model, [images, images])["coding_rate"].shape == (3, 4)
    assert token_maps(model, images).layers.is_meta
    assert patch_keys(model, images, 1).is_meta
    square, labels = torch.empty(2, 3, 16, 16, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    assert layer_gradient_norms(model, square, labels).shape == (3,)
    bank, queries = torch.empty(40, 24, device=DEVICE), torch.empty(5, 24, device=DEVICE)
    assert nearest(bank, queries, 3, first=0).is_meta


def test_a_tensor_that_stayed_on_the_cpu_is_seen(model: Transformer) -> None:
    with pytest.raises(RuntimeError, match="device"):
        model(torch.empty(2, 3, 16, 16))


@pytest.mark.parametrize("again", [0, 2])
@pytest.mark.parametrize("images", [1, 8])
def test_a_step_makes_no_tensor_elsewhere(again: int, images: int) -> None:
    with DEVICE:
        model = Transformer(replace(CONFIG, dropout=0.1)).train()
        batch, labels = torch.empty(images, 3, 16, 16), torch.empty(images, dtype=torch.int64)
    model.set_execution(recompute=again, images=images)
    optimizer = Lion(model.parameters(), lr=1e-3, weight_decay=0.1)
    optimizer.grad_scale, optimizer.found_inf = torch.empty((), device=DEVICE), torch.empty((), device=DEVICE)
    F.cross_entropy(model(batch).float(), labels, label_smoothing=0.1).backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())
    assert all(state["exp_avg"].is_meta for state in optimizer.state.values())
