"""Foreground without labels: where the class token looks, and the cut that a picture's own patches suggest.

    attention_mask    the patches that hold a given share of an attention map, as DINO shows them (arXiv 2104.14294)
    mask_cut          objects, one normalised cut after the other, as CutLER finds them (arXiv 2301.11320, section 3.2)

numpy and scipy alone; grids are (rows, columns) of patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.linalg import eigh

from crate_dist.errors import UserError

Mask = NDArray[np.bool_]
Float = NDArray[np.float64]

NO_AFFINITY = 1e-5
"""The weight between two patches that are less alike than τ: the graph stays connected."""
_SPECK, _MOST_SPECKS = 0.01, 8
_SAME_OBJECT = 0.5


def attention_mask(attention: NDArray[np.floating], mass: float = 0.6) -> Mask:
    """Marks the fewest patches that hold the share `mass` of an attention map over patches (rows, cols); same shape.

    Raises UserError when `mass` is no share above 0.
    """
    if not 0 < mass <= 1:
        raise UserError(f"--mass is a share above 0 and up to 1, not {mass}")
    flat = np.asarray(attention, dtype=np.float64).ravel()
    order = np.argsort(-flat, kind="stable")
    held = np.cumsum(flat[order]) - flat[order]  # before each patch is added
    mask = np.zeros(flat.shape, dtype=bool)
    mask[order[held < mass * flat.sum() * (1 - 1e-12)]] = True
    return mask.reshape(attention.shape)


def affinity(features: NDArray[np.floating], tau: float) -> Float:
    """Joins patches whose features (patches, d) have a cosine above τ by 1, others by next to 0: (patches, patches).

    A patch without features, one that an earlier object has taken, is like no other.
    """
    features = np.asarray(features, dtype=np.float64)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    unit = np.divide(features, lengths, out=np.zeros_like(features), where=lengths > 0)
    alike = (unit @ unit.T > tau) & (lengths > 0) & (lengths.T > 0)
    return np.where(alike, 1.0, NO_AFFINITY)


def second_eigenvector(weights: Float) -> Float:
    """Returns x of the second smallest λ in (D - W) x = λ D x, D the row sums of W (patches, patches): (patches,).

    The relaxed normalised cut of Shi and Malik (2000), computed as the second largest of the symmetric
    D^-½ W D^-½; length and sign are arbitrary.
    """
    scale = 1 / np.sqrt(weights.sum(axis=1))
    last = len(weights) - 1
    _, vectors = eigh(scale[:, None] * weights * scale, subset_by_index=[last - 1, last - 1])
    cut: Float = scale * vectors[:, 0]
    return cut


def mask_cut(features: NDArray[np.floating], tau: float = 0.15, objects: int = 3) -> list[Mask]:
    """Finds up to `objects` masks, the most salient first, of a picture's features (rows, cols, d).

    Each is cut out of the graph of what the ones before have left: of the two sides of the cut at the eigenvector's
    mean, the one with its largest entry, unless that has three of the picture's corners; and of that side, what
    hangs together with the entry. The search ends early at one that shares more than half with what was found
    before. Specks, what adds no more than 1 % of the picture, are taken out and do not count.

    It departs from CutLER's code: see docs/published-code.md.

    Raises UserError when there are fewer than two patches.
    """
    rows, cols, width = features.shape
    if rows * cols < 2:
        raise UserError(f"a cut needs two patches at least, and the picture has {rows * cols}")
    found: list[Mask] = []
    taken = np.zeros((rows, cols), dtype=bool)
    cuts = _cuts(np.array(features, dtype=np.float64).reshape(-1, width), (rows, cols), tau)
    for mask in islice(cuts, objects + _MOST_SPECKS):
        if iou(mask, taken) > _SAME_OBJECT or len(found) == objects:
            break
        new = mask & ~taken  # a patch without features may hang together with others
        if new.mean() > _SPECK:
            found.append(new)
        taken |= mask
    return found


def iou(mask: Mask, truth: Mask) -> float:
    """Returns intersection over union of two masks of one shape; 0 when both are empty."""
    union = np.logical_or(mask, truth).sum()
    return float(np.logical_and(mask, truth).sum() / union) if union else 0.0


def _cuts(left: Float, grid: tuple[int, int], tau: float) -> Iterator[Mask]:
    """Yields one object after the other; its patches lose their features in `left`."""
    while True:
        vector = second_eigenvector(affinity(left, tau)).reshape(grid)
        if abs(vector.min()) > vector.max():
            vector = -vector
        side = vector > vector.mean()
        corners = side[[0, 0, -1, -1], [0, -1, 0, -1]].sum()
        if corners >= 3:
            side, vector = ~side, -vector
        seed = np.unravel_index(np.argmax(vector), grid)
        parts, _ = ndimage.label(side)
        mask: Mask = parts == parts[seed]
        yield mask
        left[mask.ravel()] = 0
