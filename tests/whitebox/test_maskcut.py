"""Foreground is found where it was put."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import eigh

from crate_dist.errors import UserError
from crate_dist.whitebox.maskcut import affinity, attention_mask, iou, mask_cut, second_eigenvector
from crate_dist.whitebox.pca import Scale, picture_components, principal_components


def planted(grid: tuple[int, int], *boxes: tuple[slice, slice], noise: float = 0.05, seed: int = 0) -> np.ndarray:
    """Features (rows, cols, 8): each box points in a direction of its own, and so does the ground."""
    rng = np.random.default_rng(seed)
    features = rng.normal(0, noise, (*grid, 8))
    features[..., 0] += 1
    for number, box in enumerate(boxes, start=1):
        features[box] -= np.eye(8)[0]
        features[box] += np.eye(8)[number]
    return features


def test_the_second_eigenvector_is_that_of_the_generalised_problem() -> None:
    rng = np.random.default_rng(1)
    weights = rng.random((30, 30))
    weights = weights + weights.T
    degrees = np.diag(weights.sum(axis=1))
    expected = eigh(degrees - weights, degrees)[1][:, 1]
    found = second_eigenvector(weights)
    cosine = found @ expected / np.linalg.norm(found) / np.linalg.norm(expected)
    assert abs(cosine) == pytest.approx(1, abs=1e-9)


def test_two_blocks_are_cut_between_them() -> None:
    block = np.repeat([0, 1], [12, 20])
    weights = np.where(block[:, None] == block, 1.0, 1e-5)
    vector = second_eigenvector(weights)
    assert len(np.unique(np.sign(vector[block == 0]))) == 1
    assert np.array_equal(vector > vector.mean(), block == (1 if vector[-1] > 0 else 0))


def test_affinity_joins_what_is_alike_and_leaves_out_what_is_taken() -> None:
    features = np.array([[1.0, 0], [3, 0.1], [0, 2], [0, 0]])
    joined = affinity(features, tau=0.15)
    assert (joined == 1).tolist() == [
        [True, True, False, False],
        [True, True, False, False],
        [False, False, True, False],
        [False, False, False, False],
    ]
    assert joined.min() > 0
    assert (affinity(features, tau=-0.5)[3] < 1).all()


def test_objects_are_cut_out_one_after_the_other() -> None:
    large, small = (slice(2, 8), slice(2, 7)), (slice(3, 6), slice(10, 13))
    masks = mask_cut(planted((10, 16), large, small), objects=2)
    truth = [np.zeros((10, 16), dtype=bool) for _ in range(2)]
    truth[0][large], truth[1][small] = True, True
    assert sorted(round(max(iou(mask, one) for mask in masks), 2) for one in truth) == [1, 1]


def test_what_has_three_corners_is_the_ground() -> None:
    middle = (slice(1, 9), slice(1, 9))  # larger than the ground around it
    (mask,) = mask_cut(planted((10, 10), middle), objects=1)
    assert mask[1:9, 1:9].all()
    assert mask.sum() == 64


def test_no_object_is_empty_or_a_speck() -> None:
    counts = []
    for seed in range(20):
        features = planted((10, 16), (slice(2, 8), slice(2, 7)), (slice(5, 9), slice(10, 14)), noise=0.3, seed=seed)
        masks = mask_cut(features, objects=4)
        counts.append(len(masks))
        assert all(mask.sum() > 0.01 * mask.size for mask in masks)
    assert max(counts) > 1


def test_no_more_objects_are_named_than_there_are() -> None:
    masks = mask_cut(planted((10, 16), (slice(2, 8), slice(2, 7))), objects=5)
    assert 1 <= len(masks) <= 5
    assert np.sum(masks, axis=0).max() == 1  # none of them overlap
    with pytest.raises(UserError, match="two patches at least"):
        mask_cut(np.ones((1, 1, 4)))


def test_attention_masks_are_the_fewest_patches_with_their_share() -> None:
    attention = np.array([[0.4, 0.1], [0.2, 0.3]])
    assert attention_mask(attention, 0.6).tolist() == [[True, False], [False, True]]
    assert attention_mask(attention, 0.7).tolist() == [[True, False], [False, True]]
    assert attention_mask(attention, 0.71).tolist() == [[True, False], [True, True]]
    assert attention_mask(0.001 * attention, 1).all()
    with pytest.raises(UserError, match=r"not 1\.5"):
        attention_mask(attention, 1.5)


def test_components_are_those_of_a_singular_value_decomposition() -> None:
    features = np.random.default_rng(2).normal(size=(40, 6)) * [5, 3, 2, 1, 1, 1]
    centred = features - features.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    scores, shares = principal_components(features, 3)
    assert np.allclose(np.abs(scores), np.abs(left * values)[:, :3])
    assert np.allclose(shares, (values**2 / (values**2).sum())[:3])
    scores, shares = principal_components(features[:, :2], 3)
    assert scores[:, 2].tolist() == [0] * 40
    assert shares[2] == 0


@pytest.mark.parametrize("scale", ["all", "each"])
def test_the_first_component_tells_the_foreground_over_pictures_of_any_shape(scale: Scale) -> None:
    here, there = (slice(2, 7), slice(3, 6)), (slice(1, 4), slice(4, 10))
    found = picture_components([planted((9, 9), here), planted((6, 12), there)], scale=scale)
    truths = [np.zeros((9, 9), dtype=bool), np.zeros((6, 12), dtype=bool)]
    truths[0][here], truths[1][there] = True, True
    for one, truth in zip(found, truths, strict=True):
        assert np.array_equal(one.foreground, truth)
        assert (one.colours[~truth] == 0).all()
    each = [(one.first.ravel(), one.colours[truth]) for one, truth in zip(found, truths, strict=True)]
    together = [tuple(np.concatenate(parts) for parts in zip(*each, strict=True))]
    for first, colours in each if scale == "each" else together:
        assert first.min() == 0
        assert first.max() == 1
        assert colours.max(axis=0).tolist() == [1, 1, 1]
    (other,) = picture_components([planted((9, 9), (slice(2, 7), slice(0, 4)))], invert=True)
    assert not other.foreground[2:7, 0:4].any()
    assert other.foreground.sum() == 81 - 20


def test_colours_are_those_of_the_published_figure() -> None:
    """Scikit-learn's PCA, and its scaling in each picture: the ground has a score of one below the smallest.

    The signs are ours: scikit-learn's are those of the largest entry, which two pictures may turn.
    """
    PCA = pytest.importorskip("sklearn.decomposition").PCA
    rng = np.random.default_rng(3)
    features = [planted((9, 9), (slice(2, 7), slice(3, 6))), planted((6, 12), (slice(1, 4), slice(4, 10)))]
    features = [one + rng.normal(0, 0.3, one.shape) * [0, 1, 0, 2, 0, 3, 0, 0] for one in features]
    found = picture_components(features, scale="each")
    pca = PCA(3)
    kept = pca.fit_transform(np.concatenate([f[one.foreground] for f, one in zip(features, found, strict=True)]))
    kept *= np.sign((pca.components_**3).sum(axis=1))
    for one, scores in zip(found, np.split(kept, [found[0].foreground.sum()]), strict=True):
        least = min(0.0, scores.min()) - 1
        expected = (scores - least) / (scores.max(axis=0) - least)
        assert np.allclose(one.colours[one.foreground], expected)
        assert not one.colours[~one.foreground].any()


def test_a_colour_means_the_same_in_all_pictures_and_does_not_turn_with_those_beside_it() -> None:
    features = []
    for seed, size in enumerate((5, 6, 7)):  # what is alike in all: the objects change along three axes
        box = (slice(1, 1 + size), slice(1, 1 + size))
        one = planted((9, 9), box, noise=0.01, seed=seed)
        y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
        one[box][..., 2:5] += 0.3 * np.stack([3 * x, 2 * y, x * y], axis=-1)
        features.append(one)
    together = picture_components(features)
    colours = np.concatenate([found.colours[found.foreground] for found in together])
    assert colours.min(axis=0).tolist() == [0, 0, 0]
    assert colours.max(axis=0).tolist() == [1, 1, 1]
    for kept in ([0, 1], [0, 2], [1, 2]):
        for n, alone in zip(kept, picture_components([features[n] for n in kept]), strict=True):
            assert np.array_equal(alone.foreground, together[n].foreground)
            assert np.abs(alone.colours - together[n].colours).mean() < 0.1


def test_holes_in_the_foreground_are_filled() -> None:
    features = planted((9, 9), (slice(2, 7), slice(2, 7)))
    features[4, 4] = features[0, 0]
    (one,) = picture_components([features])
    assert one.foreground[2:7, 2:7].all()
    with pytest.raises(UserError, match=r"between 0 and 1, not at 1\.5"):
        picture_components([features], threshold=1.5)
