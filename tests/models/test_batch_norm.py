"""Batch norm over groups of images: what torch's computes of each group, whatever a rank has at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from crate_dist.models.batch_norm import GroupedBatchNorm, statistics, take_statistics


@pytest.fixture
def norms() -> tuple[GroupedBatchNorm, nn.BatchNorm2d]:
    torch.manual_seed(0)
    ours, torchs = GroupedBatchNorm(6), nn.BatchNorm2d(6)
    with torch.no_grad():
        ours.weight.uniform_(0.5, 2)
        ours.bias.normal_()
    torchs.load_state_dict(ours.state_dict())  # the published files' names, and no others
    return ours, torchs


def _images() -> Tensor:
    return torch.randn(12, 6, 5, 4, generator=torch.Generator().manual_seed(1)) * 2 + 3


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_each_group_is_normalised_as_torch_normalises_it_alone(
    norms: tuple[GroupedBatchNorm, nn.BatchNorm2d], memory: torch.memory_format
) -> None:
    ours, torchs = norms
    ours.group = 4
    x, alone = (_images().to(memory_format=memory).requires_grad_() for _ in range(2))
    y, expected = ours(x), torch.cat([torchs(group) for group in alone.split(4)])
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(y.detach())
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, alone.grad)
    torch.testing.assert_close(ours.weight.grad, torchs.weight.grad)
    torch.testing.assert_close(ours.bias.grad, torchs.bias.grad)


@pytest.mark.parametrize("group", [12, 4])
def test_channels_that_lie_last_stay_there_in_both_passes(
    norms: tuple[GroupedBatchNorm, nn.BatchNorm2d], group: int
) -> None:
    ours, _ = norms
    ours.group = group
    x = _images().to(memory_format=torch.channels_last).requires_grad_()
    y = ours(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    [gradient] = torch.autograd.grad(y, x, torch.ones_like(y))
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_running_statistics_change_when_they_are_taken_and_are_the_same_for_any_division_into_ranks(
    norms: tuple[GroupedBatchNorm, nn.BatchNorm2d],
) -> None:
    whole, _ = norms
    whole.group = 4
    ranks = [copy.deepcopy(whole) for _ in range(2)]
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    whole(_images())
    ranks[0](_images()[:4])
    ranks[0](_images()[4:8])
    ranks[1](_images()[8:])
    assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())
    summed = statistics(ranks[0]) + statistics(ranks[1])
    take_statistics(whole, statistics(whole))
    take_statistics(ranks[0], summed)
    for name, value in ranks[0].state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name])
    assert int(whole.num_batches_tracked) == 1
    mean = torch.stack([group.mean((0, 2, 3)) for group in _images().split(4)]).mean(0)
    var = torch.stack([group.transpose(0, 1).flatten(1).var(1) for group in _images().split(4)]).mean(0)
    torch.testing.assert_close(whole.running_mean, 0.1 * mean)
    torch.testing.assert_close(whole.running_var, 0.9 + 0.1 * var)
    assert not statistics(whole).any()


def test_evaluation_uses_the_running_statistics_and_adds_nothing_to_them(
    norms: tuple[GroupedBatchNorm, nn.BatchNorm2d],
) -> None:
    ours, torchs = norms
    ours(_images())
    take_statistics(ours, statistics(ours))
    torchs(_images())
    torch.testing.assert_close(ours.eval()(_images()), torchs.eval()(_images()))
    ours.group = 5  # which 12 images are no multiple of
    torch.testing.assert_close(ours(_images()[:1]), torchs(_images()[:1]))
    assert not statistics(ours).any()


def test_statistics_of_nothing_change_nothing(norms: tuple[GroupedBatchNorm, nn.BatchNorm2d]) -> None:
    ours, _ = norms
    ours(_images())
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    take_statistics(ours, torch.zeros_like(statistics(ours)))
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    assert not statistics(ours).any()


def test_a_model_without_batch_norm_has_no_statistics() -> None:
    model = nn.Linear(2, 2)
    assert statistics(model).numel() == 0
    take_statistics(model, statistics(model))
    with pytest.raises(ValueError, match="expected 0 statistics for the batch norms of this model, got 3"):
        take_statistics(model, torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_stay_in_fp32_whatever_the_weights_are_cast_to(
    norms: tuple[GroupedBatchNorm, nn.BatchNorm2d], dtype: torch.dtype
) -> None:
    ours, torchs = norms
    with torch.no_grad():
        ours.running_mean.fill_(1 + 2**-12)  # which neither type has
    exact = ours.running_mean.clone()
    ours.to(dtype)
    assert ours.weight.dtype == dtype
    assert torch.equal(ours.running_mean, exact)
    y = ours(_images().to(dtype))
    assert y.dtype == dtype
    assert statistics(ours).dtype == torch.float32
    torch.testing.assert_close(y.float(), torchs(_images()), atol=0.05, rtol=0.02)
    y.float().square().sum().backward()
    assert ours.eval()(_images().to(dtype)).dtype == dtype
    assert ours.to("meta").running_var.dtype == torch.float32


def test_a_batch_that_does_not_divide_is_told_what_would(norms: tuple[GroupedBatchNorm, nn.BatchNorm2d]) -> None:
    ours, _ = norms
    ours.group = 5
    with pytest.raises(ValueError, match=r"12 images do not divide into groups of 5 .* such as 10 or 15"):
        ours(_images())
    with pytest.raises(ValueError, match=r"3 images do not divide into groups of 5 .* such as 5$"):
        ours(_images()[:3])


def test_a_model_built_on_meta_trains_with_weights_assigned(norms: tuple[GroupedBatchNorm, nn.BatchNorm2d]) -> None:
    with torch.device("meta"):
        built = GroupedBatchNorm(6)
    built.load_state_dict(norms[0].state_dict(), assign=True)
    built(_images())
    assert statistics(built)[-1] == 1
