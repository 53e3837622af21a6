"""Drop path, or stochastic depth (Huang et al., 1603.09382): an image passes a residual branch by, at random.

Every branch has the same rate, as ToST has it. What is dropped is a function of (seed, step, branch, place of the image
in the global batch), so that neither ranks nor accumulation change it.
"""

from __future__ import annotations

import numpy as np
import torch

from crate_dist.data.feed import to_device
from crate_dist.data.order import hash64

_SALT = 3


def kept(
    rate: float, branches: int, first: int, images: int, seed: int, step: int, device: torch.device
) -> torch.Tensor:
    """Returns the factors (branches, images) of the step after `step`: 0 for a dropped one, else 1 / (1 - rate), fp32.

    first: place of the first of these images in the global batch, as the order lays it out
    """
    places = np.arange(first, first + images, dtype=np.int64)
    drawn = hash64(seed, step, _SALT, np.arange(branches, dtype=np.int64)[:, None], places)
    factors = (drawn >= np.uint64(rate * 2**64)) / np.float32(1 - rate)
    return to_device(factors, device, torch.float32)
