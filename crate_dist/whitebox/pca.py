"""Principal components of patches: pictures in which patches of one kind have one colour.

As the published code's pca_visualization does (arXiv 2308.16271, and Amir et al., arXiv 2112.05814): the components
are those of the patches of all pictures together; the first, scaled to 0 … 1 in each picture and cut at a threshold,
is the foreground, with its holes filled; three components of the foreground's patches alone are red, green and blue,
again scaled in each picture. Which side is the foreground is chosen there by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from crate_dist.errors import UserError

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Components:
    """The components of one picture of (rows, cols) patches.

    first: the first component, scaled to 0 … 1, high in the foreground, (rows, cols)
    foreground: bool (rows, cols)
    colours: three components of the foreground over all pictures, scaled to 0 … 1 in this one, (rows, cols, 3); 0
    elsewhere
    """

    first: Float
    foreground: NDArray[np.bool_]
    colours: Float


def picture_components(
    features: Sequence[NDArray[np.floating]], threshold: float = 0.5, invert: bool = False
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
    scores = principal_components(_flat(features), 1)[:, 0]
    sides = [[_scaled(sign * part) for part in _split(scores, grids)] for sign in (1, -1)]
    sides.sort(key=lambda maps: float(np.mean([_on_border(one > threshold) for one in maps])))
    firsts = sides[1 if invert else 0]
    masks = [ndimage.binary_fill_holes(first > threshold) for first in firsts]
    everything = np.concatenate([mask.ravel() for mask in masks])
    scores = np.zeros((len(everything), 3))
    scores[everything] = principal_components(_flat(features)[everything], 3)
    return [
        Components(first, mask, _coloured(part, mask))
        for first, mask, part in zip(firsts, masks, _split(scores, grids), strict=True)
    ]


def principal_components(features: NDArray[np.floating], count: int) -> Float:
    """Returns the scores of the first `count` components, the largest variance first: (samples, d) -> (samples, count).

    Each has the sign that makes the largest entry of its axis positive; components beyond the rank are 0.
    """
    centred = np.asarray(features, dtype=np.float64)
    centred = centred - centred.mean(axis=0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    axes = axes[:, ::-1][:, :count]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    scores = np.zeros((len(centred), count))
    scores[:, : axes.shape[1]] = centred @ axes
    return scores


def _flat(features: Sequence[NDArray[np.floating]]) -> NDArray[np.floating]:
    return np.concatenate([picture.reshape(-1, picture.shape[-1]) for picture in features])


def _split(values: Float, grids: Sequence[tuple[int, ...]]) -> list[Float]:
    ends = np.cumsum([rows * cols for rows, cols in grids])
    parts = np.split(values, ends[:-1])
    return [part.reshape(*grid, *part.shape[1:]) for part, grid in zip(parts, grids, strict=True)]


def _scaled(values: Float, axis: tuple[int, ...] | None = None) -> Float:
    low, high = values.min(axis=axis, keepdims=True), values.max(axis=axis, keepdims=True)
    return np.divide(values - low, high - low, out=np.zeros_like(values), where=high > low)


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
