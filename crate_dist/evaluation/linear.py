"""A linear classifier on frozen features: multinomial logistic regression, fitted to its optimum.

    minimize over W, b:  mean cross-entropy of softmax(W x + b)  +  l2 / 2 · ‖W‖²

over features x that are standardised by the mean and the deviation of the samples that are fitted. The problem is
convex and every step sees all samples, so that neither learning rate nor batch has a say in the result; what is left to
choose, l2, is chosen on a tenth of the training split that is held out for it. Each rank sums over its own features, in
fp64: in fp32 the search for an optimum ends where rounding begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import minimize
from torch import Tensor

from crate_dist.data.order import permutation
from crate_dist.evaluation.accuracy import label_ranks
from crate_dist.evaluation.features import Features
from crate_dist.evaluation.on_ranks import CannotMeasure
from crate_dist.evaluation.options import L2, MAX_STEPS

HELD_OUT = 10
"""One sample in ten is held out while l2 is chosen."""

_ROWS = 4096
_LIMIT_REACHED = 1


@dataclass(frozen=True, eq=False)
class Linear:
    """A fitted classifier.

    weight: fp64 (classes, d); bias: fp64 (classes,); mean, scale: fp64 (d,), by which features are standardised
    steps: that the fit took; converged: whether it came to its optimum in them
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor
    steps: int
    converged: bool

    def scores(self, values: Tensor) -> Tensor:
        """Turns standardised features, fp64 (n, d), into scores (n, classes)."""
        return torch.addmm(self.bias, values, self.weight.T)

    def standardised(self, values: Tensor) -> Tensor:
        """Returns features (n, d) as `scores` takes them, fp64."""
        return (values.double() - self.mean) * self.scale


@dataclass(frozen=True)
class L2Trial:
    """One l2 of the sweep: top-1 in per cent on the samples held out, and how the fit ended."""

    l2: float
    top1: float
    steps: int
    converged: bool


@dataclass(frozen=True)
class Probe:
    """Accuracy in per cent of the classifier with the best l2, fitted to the whole training split."""

    l2: float
    top1: float
    top5: float
    steps: int
    converged: bool
    sweep: tuple[L2Trial, ...]

    @property
    def at_the_edge(self) -> bool:
        """True where the best l2 is the largest or smallest that was tried, so that a better one may lie beyond."""
        tried = sorted(item.l2 for item in self.sweep)
        return len(tried) > 1 and self.l2 in (tried[0], tried[-1])


def probe(
    train: Features,
    val: Features,
    classes: int,
    l2s: Sequence[float] = L2,
    seed: int = 0,
    max_steps: int = MAX_STEPS,
    progress: Callable[[Sequence[float]], Iterable[float]] = iter,
) -> Probe:
    """Chooses l2, fits the whole training split, and counts on the validation split. A collective.

    The strongest l2 is fitted first, each weaker one from where the last one ended; of equally good ones the strongest
    wins. seed: chooses the samples that are held out; they do not depend on the number of ranks.
    Raises CannotMeasure when the training split has fewer samples than classes or HELD_OUT.
    """
    if train.total < max(HELD_OUT, classes):
        raise CannotMeasure(
            f"{train.total} training samples of {classes} classes are too few for a linear probe; "
            f"{max(HELD_OUT, classes)} would do, and more are better"
        )
    held = held_out(train, seed)
    sweep: list[L2Trial] = []
    fits: list[Linear] = []
    for l2 in progress(sorted(l2s, reverse=True)):
        fits.append(fit(train, ~held, classes, l2, max_steps, start=fits[-1] if fits else None))
        top1, _ = accuracy(fits[-1], train, held)
        sweep.append(L2Trial(l2, top1, fits[-1].steps, fits[-1].converged))
    best = max(range(len(sweep)), key=lambda n: (sweep[n].top1, -n))
    whole = fit(train, torch.ones_like(held), classes, sweep[best].l2, max_steps, start=fits[best])
    top1, top5 = accuracy(whole, val, torch.ones_like(val.labels, dtype=torch.bool))
    return Probe(sweep[best].l2, top1, top5, whole.steps, whole.converged, tuple(sweep))


def held_out(features: Features, seed: int) -> Tensor:
    """Marks this rank's samples that are held out, bool (n,)."""
    chosen = torch.zeros(features.total, dtype=torch.bool)
    chosen[permutation(features.total, seed)[: features.total // HELD_OUT]] = True
    return chosen[features.first : features.first + len(features.labels)].to(features.labels.device)


@torch.no_grad()
def fit(
    features: Features, chosen: Tensor, classes: int, l2: float, max_steps: int, start: Linear | None = None
) -> Linear:
    """Finds the optimum for the chosen samples, bool (n,), of all ranks, by L-BFGS. A collective.

    All ranks take the same steps, since they see the same sums. Stops when no entry of the gradient is above 1e-6 nor
    above a tenth of l2, or after max_steps.
    """
    mean, scale, count = _standard(features, chosen)
    width, device = len(mean), mean.device

    def linear(flat: np.ndarray, steps: int = 0, converged: bool = False) -> Linear:
        parameters = torch.from_numpy(flat).to(device).view(classes, width + 1)
        return Linear(parameters[:, :width], parameters[:, width], mean, scale, steps, converged)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        model = linear(flat)
        sums = torch.zeros(1 + flat.size, dtype=torch.float64, device=device)
        gradient = sums[1:].view(classes, width + 1)
        for raw, labels, weight in _chunks(features, chosen):
            values = model.standardised(raw)
            logs = model.scores(values).log_softmax(dim=1)
            sums[0] -= logs.gather(1, labels[:, None])[:, 0] @ weight
            # d cross-entropy / d scores = probabilities - one-hot labels
            slope = logs.exp_()
            slope[torch.arange(len(labels), device=device), labels] -= 1
            slope *= weight[:, None]
            gradient[:, :width] += slope.T @ values
            gradient[:, width] += slope.sum(dim=0)
        dist.all_reduce(sums)
        sums /= count
        sums[0] += l2 / 2 * model.weight.square().sum()
        gradient[:, :width] += l2 * model.weight
        return sums[0].item(), sums[1:].cpu().numpy()

    begin = np.zeros((classes, width + 1))
    if start is not None:
        begin[:, :width], begin[:, width] = start.weight.cpu(), start.bias.cpu()
    limits = {"maxiter": max_steps, "maxfun": 2 * max_steps, "gtol": min(1e-6, 0.1 * l2), "ftol": 0.0}
    found = minimize(objective, begin.ravel(), jac=True, method="L-BFGS-B", options=limits)
    return linear(found.x, found.nit, found.status != _LIMIT_REACHED)


@torch.no_grad()
def accuracy(model: Linear, features: Features, chosen: Tensor) -> tuple[float, float]:
    """Returns top-1 and top-5 in per cent over the chosen samples, bool (n,), of all ranks. A collective."""
    counts = torch.zeros(3, dtype=torch.int64, device=features.labels.device)
    for values, labels, weight in _chunks(features, chosen):
        ranks = label_ranks(model.scores(model.standardised(values)), labels)
        counts += torch.stack([((ranks < n) & (weight > 0)).sum() for n in (1, 5, len(model.bias))])
    dist.all_reduce(counts)
    top1, top5, total = counts.tolist()
    return 100 * top1 / total, 100 * top5 / total


def _chunks(features: Features, chosen: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields (values, labels, weight) of some rows at a time, weight being 1 for the chosen ones, else 0."""
    for first in range(0, len(chosen), _ROWS):
        rows = slice(first, first + _ROWS)
        yield features.values[rows], features.labels[rows], chosen[rows].double()


def _standard(features: Features, chosen: Tensor) -> tuple[Tensor, Tensor, float]:
    """Returns mean and 1 / deviation of the chosen samples of all ranks, fp32 (d,), and their number."""
    width = features.values.shape[1]
    sums = torch.zeros(width + 1, dtype=torch.float64, device=features.values.device)
    for values, _, weight in _chunks(features, chosen):
        sums[:width] += weight @ values.double()
        sums[width] += weight.sum()
    dist.all_reduce(sums)
    count = sums[width].item()
    mean = sums[:width] / count
    squares = torch.zeros_like(mean)
    for values, _, weight in _chunks(features, chosen):
        squares += weight @ (values.double() - mean).square()
    dist.all_reduce(squares)
    deviation = (squares / count).sqrt()
    scale = torch.where(deviation > 1e-6, 1 / deviation, 0.0)  # what is constant says nothing
    return mean, scale, count
