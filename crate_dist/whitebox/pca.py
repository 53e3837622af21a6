"""Principal components of patches: pictures in which patches of one kind have one colour.

After the published code's pca_visualization (arXiv 2308.16271, and Amir et al., arXiv 2112.05814): the components are
those of the patches of all pictures together; the first, scaled to 0 … 1 and cut at a threshold, is the foreground,
with its holes filled; three components of the foreground's patches alone are red, green and blue, again scaled. A
colour means the same in all pictures, on one scale; "each" scales in each picture, as published. Which side is the
foreground is chosen there by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from crate_dist.errors import UserError

Float = NDArray[np.float64]
Scale = Literal["all", "each"]

_OUTLIERS_PERCENT = 1
"""At either end of a component: they are shown as the ends of a scale that is that of all pictures."""


@dataclass(frozen=True)
class Components:
    """The components of one picture of (rows, cols) patches.

    first: the first component, scaled to 0 … 1, high in the foreground, (rows, cols)
    foreground: bool (rows, cols)
    colours: three components of the foreground over all pictures, scaled to 0 … 1, (rows, cols, 3); 0 elsewhere
    shares: of the variance of the foreground in all pictures that each of the three has, (3,)
    """

    first: Float
    foreground: NDArray[np.bool_]
    colours: Float
    shares: Float


def picture_components(
    features: Sequence[NDArray[np.floating]], threshold: float = 0.5, invert: bool = False, scale: Scale = "all"
) -> list[Components]:
    """Finds the components of pictures whose patches have features (rows, cols, d); grids may differ.

    A component has no sign of its own. Foreground is the side that has the smaller share of the pictures' borders;
    `invert` takes the other one.

    Raises UserError when `threshold` does not lie between 0 and 1, or features are not finite.
    """
    if not 0 < threshold < 1:
        raise UserError(f"--threshold lies between 0 and 1, not at {threshold}")
    if not np.isfinite(_flat(features)).all():
        raise UserError("the model's patches have features that are not finite, which have no components")
    grids = [picture.shape[:2] for picture in features]
    scores = principal_components(_flat(features), 1)[0][:, 0]
    sides = [_scaled_pictures(sign * scores, grids, scale) for sign in (1, -1)]
    sides.sort(key=lambda maps: float(np.mean([_on_border(one > threshold) for one in maps])))
    firsts = sides[1 if invert else 0]
    masks = [ndimage.binary_fill_holes(first > threshold) for first in firsts]
    everything = np.concatenate([mask.ravel() for mask in masks])
    scores, shares = np.zeros((len(everything), 3)), np.zeros(3)
    if everything.any():
        found, shares = principal_components(_flat(features)[everything], 3)
        scores[everything] = _within(found) if scale == "all" else found
    return [
        Components(first, mask, part if scale == "all" else _coloured(part, mask), shares)
        for first, mask, part in zip(firsts, masks, _split(scores, grids), strict=True)
    ]


def principal_components(features: NDArray[np.floating], count: int) -> tuple[Float, Float]:
    """Returns the scores of the first `count` components, the largest variance first, and each one's share of it.

    (samples, d) -> (samples, count), (count,). Each has the sign that makes the sum of its axis' cubes positive: that
    of its large entries together, which another choice of pictures moves less than it does the largest of them.
    Components beyond the rank are 0.
    """
    centred = np.asarray(features, dtype=np.float64)
    centred = centred - centred.mean(axis=0)
    variances, axes = np.linalg.eigh(centred.T @ centred)
    axes, variances = axes[:, ::-1][:, :count], variances[::-1].clip(0)
    axes = axes * np.where((axes**3).sum(axis=0) < 0, -1, 1)
    scores, shares = np.zeros((len(centred), count)), np.zeros(count)
    scores[:, : axes.shape[1]] = centred @ axes
    shares[: axes.shape[1]] = variances[:count] / (variances.sum() or 1)
    return scores, shares


def _flat(features: Sequence[NDArray[np.floating]]) -> NDArray[np.floating]:
    return np.concatenate([picture.reshape(-1, picture.shape[-1]) for picture in features])


def _split(values: Float, grids: Sequence[tuple[int, ...]]) -> list[Float]:
    ends = np.cumsum([rows * cols for rows, cols in grids])
    parts = np.split(values, ends[:-1])
    return [part.reshape(*grid, *part.shape[1:]) for part, grid in zip(parts, grids, strict=True)]


def _scaled_pictures(scores: Float, grids: Sequence[tuple[int, ...]], scale: Scale) -> list[Float]:
    if scale == "each":
        return [_scaled(part) for part in _split(scores, grids)]
    return _split(_scaled(scores), grids)


def _scaled(values: Float, axis: tuple[int, ...] | None = None) -> Float:
    low, high = values.min(axis=axis, keepdims=True), values.max(axis=axis, keepdims=True)
    return np.divide(values - low, high - low, out=np.zeros_like(values), where=high > low)


def _within(scores: Float) -> Float:
    """Returns scores (n, 3) of all pictures, scaled to 0 … 1 but for a few at either end, which become 0 and 1."""
    low, high = np.percentile(scores, [_OUTLIERS_PERCENT, 100 - _OUTLIERS_PERCENT], axis=0)
    return np.divide(scores - low, high - low, out=np.zeros_like(scores), where=high > low).clip(0, 1)


def _coloured(scores: Float, mask: NDArray[np.bool_]) -> Float:
    """Returns scores (rows, cols, 3), 0 outside `mask`, scaled as the published code does.

    The ground is given a score of one below the smallest in the picture, which sets the 0 of each component.
    """
    lowered = np.where(mask[..., None], scores, scores.min() - 1)
    return _scaled(lowered, axis=(0, 1))


def _on_border(mask: NDArray[np.bool_]) -> float:
    """Returns the share of the border's patches that are in the mask."""
    border = np.ones(mask.shape, dtype=bool)
    border[1:-1, 1:-1] = False
    return float(mask[border].mean())
