"""Features of a frozen model: one vector for every image of a split, spread over the ranks.

The feature of an image is the vector that the linear map of the head reads: of a linear head the tokens after the last
layer, pooled as the model does it (the class token, or the mean of all tokens), then its LayerNorm. It is
what DINO's evaluations use of a vision transformer (Caron et al. 2021, arXiv 2104.14294: the class token after the last
norm). Other layers can be asked for, whose tokens go through the same head, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from crate_dist.data.feed import Feed
from crate_dist.data.loader import Batch
from crate_dist.evaluation.on_ranks import CannotMeasure
from crate_dist.models.config import ModelConfig, Pool
from crate_dist.models.transformer import Transformer


@dataclass(frozen=True)
class Features:
    """This rank's contiguous share of a split's features, on its device; ranks follow each other in the split's order.

    values: fp32 (n, d); labels: int64 (n,); sizes: n of every rank; replaced: samples of the split that did not decode
    """

    values: Tensor
    labels: Tensor
    sizes: tuple[int, ...]
    replaced: int = 0

    @property
    def first(self) -> int:
        """The number in the split of this rank's first sample."""
        return sum(self.sizes[: dist.get_rank()])

    @property
    def total(self) -> int:
        """Samples of the whole split."""
        return sum(self.sizes)


def check_pool(config: ModelConfig, pool: Pool) -> None:
    """Raises CannotMeasure when a model's head has no choice of what its features are pooled from, or not this one."""
    if config.head != "linear":
        raise CannotMeasure(
            f'--pool {pool}: the features of head = "{config.head}" are what its linear map reads, and are pooled in '
            "no other way; leave --pool out"
        )
    if pool == "cls" and not config.class_token:
        raise CannotMeasure("--pool cls: there is no class token in the layers of this model; --pool mean")


def pooled(model: Transformer, images: Tensor, layer: int, pool: Pool | None = None) -> Tensor:
    """Returns features (b, d) of normalised images (b, 3, image_size, image_size) after layer 1 … depth.

    pool: in place of that of the model's linear head
    """
    z = model.embed(images)
    for block in model.layers[:layer]:
        z = block(z)
    if pool is None:
        return model.head.features(z)
    features: Tensor = model.head.norm(z.mean(dim=1) if pool == "mean" else z[:, 0])
    return features


@torch.inference_mode()
def extract(
    read: Callable[[Tensor], Tensor], batches: Iterable[Batch], width: int, num_samples: int, device: torch.device
) -> Features:
    """Extracts the features of a split, each sample once. A collective at the end; takes 4 · n · d bytes of a device.

    read: uint8 images (n, height, width, 3) -> (n, d); width: d
    batches: this rank's share; num_samples: in the whole split
    Raises CannotMeasure when a feature is not finite, on every rank.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    bounds = [num_samples * r // world_size for r in range(world_size + 1)]
    sizes = tuple(stop - first for first, stop in pairwise(bounds))
    values = torch.empty(sizes[rank], width, device=device)
    labels = torch.empty(sizes[rank], dtype=torch.int64, device=device)
    done = replaced = 0
    for batch in Feed(iter(batches), device):
        place = slice(done, done + len(batch.labels))
        values[place] = read(batch.images)
        labels[place] = batch.labels
        done, replaced = place.stop, replaced + len(batch.replaced)
    assert done == sizes[rank]
    seen = torch.stack([torch.tensor(replaced, device=device), (~values.isfinite().all(dim=1)).sum()])
    dist.all_reduce(seen)
    if broken := int(seen[1]):
        raise CannotMeasure(
            f"the features of {broken} of {num_samples} samples are not finite; --precision fp32 may help"
        )
    return Features(values, labels, sizes, int(seen[0]))


def gather_features(mine: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Returns the rows (sizes[rank], …) of all ranks, one rank's behind the other's, on every rank. A collective."""
    most = max(sizes)
    padded = mine.new_zeros(most, *mine.shape[1:])
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
