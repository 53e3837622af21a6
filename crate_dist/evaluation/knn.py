"""Weighted nearest neighbours on frozen features, as DINO reports them (arXiv 2104.14294, after Wu et al. 1805.01978).

Features are scaled to length one; each of the k training samples most similar to a query votes for its class with
weight exp(similarity / T), T = 0.07. The search is exact. Every rank looks through its own share of the training
features, so that together they hold them once, and the best of all ranks are merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from crate_dist.evaluation.accuracy import label_ranks
from crate_dist.evaluation.features import Features, gather_features
from crate_dist.evaluation.options import TEMPERATURE

QUERIES = 512
BANK = 32_768
"""Similarities of QUERIES x BANK pairs are held at a time: 67 MB, and some 400 MB with what puts them in order."""

_LOWEST = torch.iinfo(torch.int64).min
_INDEX_BITS = 32
_INDEX = (1 << _INDEX_BITS) - 1


@dataclass(frozen=True)
class Neighbours:
    """Accuracy in per cent of the vote of k neighbours."""

    k: int
    top1: float
    top5: float


@torch.inference_mode()
def classify(
    train: Features,
    queries: Features,
    ks: Sequence[int],
    temperature: float = TEMPERATURE,
    progress: Callable[[range], Iterable[int]] = iter,
) -> list[Neighbours]:
    """Returns one result per k, over all queries of all ranks. A collective.

    A class is in the top 5 when fewer than five have more votes; one without any vote never is. Among equally similar
    neighbours the earlier training sample comes first, among classes with equal votes the lower number.
    ks: none above train.total
    """
    labels = gather_features(train.labels, train.sizes).cpu()
    wanted, right = gather_features(queries.values, queries.sizes), gather_features(queries.labels, queries.sizes).cpu()
    bank, wanted = F.normalize(train.values), F.normalize(wanted)
    classes = int(max(labels.max(), right.max())) + 1
    hits = torch.zeros(len(ks), 2, dtype=torch.int64)
    for number in progress(range(-(-len(wanted) // QUERIES))):
        rows = slice(number * QUERIES, (number + 1) * QUERIES)
        best = merged(nearest(bank, wanted[rows], max(ks), train.first))
        if number % dist.get_world_size() == dist.get_rank():
            hits += voted(best.cpu(), labels, right[rows], classes, ks, temperature)
    hits = hits.to(bank.device)
    dist.all_reduce(hits)
    return [
        Neighbours(k, 100 * top1 / len(right), 100 * top5 / len(right))
        for k, (top1, top5) in zip(ks, hits.tolist(), strict=True)
    ]


def nearest(bank: Tensor, queries: Tensor, k: int, first: int) -> Tensor:
    """Returns keys of the k rows of `bank` most similar to each query, int64 (queries, k), best first.

    bank: (n, d), n may be below k; queries: (queries, d); both of length one; first: sample number of the bank's first
    row. A key holds similarity and sample number, see `unpack`; no two are equal, so their order is no accident.
    """
    best = torch.full((len(queries), k), _LOWEST, device=bank.device)
    for start in range(0, len(bank), BANK):
        similarity = queries @ bank[start : start + BANK].T
        keys = torch.cat([best, pack(similarity, first + start)], dim=1)
        best = keys.topk(k, dim=1).values
    return best


def pack(similarity: Tensor, first: int) -> Tensor:
    """Turns fp32 (queries, n) of samples first, first + 1, … into int64 that sort by similarity, then sample."""
    bits = (similarity + 0.0).view(torch.int32)  # + 0.0: of the two zeros one is left
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers, negative floats run backwards
    samples = torch.arange(first, first + similarity.shape[1], device=similarity.device)
    return ordered.long() << _INDEX_BITS | (_INDEX - samples)


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Returns similarities, fp32, and sample numbers, int64, of keys of any shape."""
    ordered = (keys >> _INDEX_BITS).int()
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32), _INDEX - (keys & _INDEX)


def merged(mine: Tensor) -> Tensor:
    """Returns the best keys, (queries, k), of all ranks. A collective."""
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine.contiguous())
    return torch.cat(every, dim=1).topk(mine.shape[1], dim=1).values


def voted(best: Tensor, labels: Tensor, right: Tensor, classes: int, ks: Sequence[int], temperature: float) -> Tensor:
    """Counts hits in top-1 and top-5 for each k, int64 (ks, 2); all on the CPU, where sums have an order.

    best: keys (queries, k); labels: of the training samples; right: int64 (queries,)
    """
    similarity, samples = unpack(best)
    # The largest weight is one: that changes no order of votes, and no temperature overflows.
    weights = ((similarity.double() - similarity[:, :1]) / temperature).exp()
    hits = []
    for k in ks:
        votes = torch.zeros(len(best), classes, dtype=torch.float64)
        votes.scatter_add_(1, labels[samples[:, :k]], weights[:, :k])
        ranks = label_ranks(votes, right)
        supported = votes.gather(1, right[:, None])[:, 0] > 0
        hits.append([int(((ranks < n) & supported).sum()) for n in (1, 5)])
    return torch.tensor(hits)
