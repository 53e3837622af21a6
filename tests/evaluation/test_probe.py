"""Features are what the head reads; neighbours and the linear probe agree with independent computations of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from crate_dist.checkpoint.trained import find_layer
from crate_dist.config import ImageSection, ModelSection
from crate_dist.data.index import ShardIndex
from crate_dist.data.loader import Normalize, eval_loader, eval_transform
from crate_dist.errors import UserError
from crate_dist.evaluation import knn
from crate_dist.evaluation import linear as linear_probe
from crate_dist.evaluation.features import Features, extract, pooled
from crate_dist.evaluation.on_ranks import CannotMeasure
from crate_dist.models.build import build_model
from crate_dist.models.config import Pool
from crate_dist.models.transformer import Transformer
from crate_dist.models.weights.write import export_model
from crate_dist.probe import main
from crate_dist.world import World
from tests.conftest import casts, write_split
from tests.ranks import REPOSITORY, spawn

IMAGES = ImageSection(eval_crop=1.0)
KS = [1, 5, 30, 200]
CLASSES = 6
L2S = [1e-1, 1e-4]


def model(pool: Pool = "cls") -> Transformer:
    return build_model(ModelSection(arch="crate_demo", image_size=32, patch_size=8, pool=pool), 4, seed=3).eval()


def clouds(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """fp32 features (count, 12) of six overlapping classes, some of them twice, and labels."""
    centers = np.random.default_rng(0).normal(size=(CLASSES, 12))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    values = centers[labels] + 1.5 * rng.normal(size=(count, 12))
    values[-10:] = values[:10] if count > 20 else values[-10:]
    return (3 + 2 * values).astype(np.float32), labels


def share(values: np.ndarray, labels: np.ndarray, world: World) -> Features:
    """As `extract` spreads them."""
    bounds = [len(values) * r // world.world_size for r in range(world.world_size + 1)]
    mine = slice(bounds[world.rank], bounds[world.rank + 1])
    sizes = tuple(b - a for a, b in pairwise(bounds))
    return Features(torch.from_numpy(values[mine]), torch.from_numpy(labels[mine]), sizes)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_the_feature_is_what_the_linear_part_of_the_head_reads(pool: Pool) -> None:
    net, images = model(pool), torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        last = pooled(net, images, net.config.depth, pool)
        assert torch.allclose(net.head.linear(last), net(images), atol=1e-6)
        tokens = net.forward_intermediates(images).features[1]
        expected = net.head.norm(tokens[:, 0] if pool == "cls" else tokens.mean(dim=1))
        assert torch.allclose(pooled(net, images, 2, pool), expected, atol=1e-6)


def test_layers_count_from_one_and_the_last_is_minus_one() -> None:
    config = model().config
    assert [find_layer(asked, config.depth) for asked in (None, -1, 1, config.depth)] == [config.depth] * 2 + [
        1,
        config.depth,
    ]
    for asked in (0, config.depth + 1, -config.depth - 1):
        with pytest.raises(UserError, match=f"1 to {config.depth}"):
            find_layer(asked, config.depth)


class OnRanks(NamedTuple):
    """The findings of one rank."""

    features: Features
    neighbours: list[knn.Neighbours]
    nearest: tuple[torch.Tensor, torch.Tensor]
    fits: dict[float, linear_probe.Linear]
    probe: linear_probe.Probe
    held_out: torch.Tensor
    too_few: str


def everything_on_ranks(world: World, device: torch.device, shards: Path) -> OnRanks:
    """In one go, since starting ranks takes longer than all of it."""
    index, net, normalize = ShardIndex.load(shards), model(), Normalize(IMAGES.mean, IMAGES.std, device, torch.float32)
    batches = eval_loader(index, world.rank, world.world_size, eval_transform(IMAGES, 32), batch=8, workers=0)
    features = extract(
        lambda images: pooled(net, normalize(images), 4, "cls"), batches, net.config.dim, index.num_samples, device
    )
    train, val = share(*clouds(311, seed=1), world), share(*clouds(97, seed=2), world)
    knn.QUERIES, knn.BANK = 40, 50  # several rounds of both
    alike = np.repeat(np.array([[1.0, 0.0]], dtype=np.float32), 11, axis=0)
    alike[3] = [0.6, 0.8]
    bank = share(alike, np.arange(11), world)
    found = knn.nearest(bank.values, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 11, bank.first)
    chosen = torch.ones(len(train.labels), dtype=torch.bool)
    if world.is_main:
        chosen[:7] = False
    too_few = ""
    try:
        linear_probe.probe(share(*clouds(8, seed=1), world), val, CLASSES)
    except CannotMeasure as error:
        too_few = str(error)
    return OnRanks(
        features,
        knn.classify(train, val, KS),
        knn.unpack(knn.merged(found)),
        {l2: linear_probe.fit(train, chosen, CLASSES, l2, max_steps=500) for l2 in L2S},
        linear_probe.probe(train, val, CLASSES, [1e-4, 10.0, 1e-2]),
        linear_probe.held_out(train, seed=4),
        too_few,
    )


@pytest.fixture(scope="module")
def odd_split(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """23 samples, of which number 4 is no image."""
    samples = list(casts(23, seed=5))
    samples[4] = (samples[4][0], b"no image", samples[4][2])
    return write_split(tmp_path_factory.mktemp("odd") / "odd", iter(samples), shard_samples=10, classes=4)


@pytest.fixture(scope="module")
def alone(odd_split: ShardIndex) -> OnRanks:
    """The findings of a single rank."""
    return spawn(everything_on_ranks, 1, odd_split.root)[0]


@pytest.fixture(scope="module")
def together(odd_split: ShardIndex) -> list[OnRanks]:
    """The findings of each of three ranks."""
    return spawn(everything_on_ranks, 3, odd_split.root)


@pytest.mark.spawn
def test_ranks_hold_every_sample_once_in_the_order_of_the_split(
    odd_split: ShardIndex, alone: OnRanks, together: list[OnRanks]
) -> None:
    expected = odd_split.rows["label"].astype(np.int64)
    expected[4] = expected[5]  # its substitute's
    whole = alone.features
    assert whole.labels.tolist() == expected.tolist()
    assert torch.equal(whole.values[4], whole.values[5])
    parts = [rank.features for rank in together]
    assert torch.allclose(torch.cat([part.values for part in parts]), whole.values, atol=1e-5)
    assert torch.cat([part.labels for part in parts]).tolist() == expected.tolist()
    for part in (whole, *parts):
        assert (part.total, part.replaced) == (23, 1)


def knn_by_hand(k: int) -> tuple[float, float]:
    """One query after the other, in numpy and fp64."""
    bank, labels = clouds(311, seed=1)
    queries, right = clouds(97, seed=2)
    bank, queries = (
        x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1)[:, None] for x in (bank, queries)
    )
    top1 = top5 = 0
    for query, label in zip(queries, right, strict=True):
        similarity = bank @ query
        votes: dict[int, float] = defaultdict(float)
        for sample in sorted(range(len(bank)), key=lambda n: -similarity[n])[:k]:
            votes[int(labels[sample])] += np.exp(similarity[sample] / 0.07)
        order = sorted(votes, key=lambda c: -votes[c])
        top1 += label in order[:1]
        top5 += label in order[:5]
    return 100 * top1 / len(right), 100 * top5 / len(right)


@pytest.mark.spawn
def test_neighbours_vote_as_computed_one_by_one_at_any_number_of_ranks(alone: OnRanks, together: list[OnRanks]) -> None:
    for rank in (alone, *together):  # of three ranks none has 200 training samples
        for found, k in zip(rank.neighbours, KS, strict=True):
            assert found.k == k
            assert (found.top1, found.top5) == pytest.approx(knn_by_hand(k))


@pytest.mark.spawn
def test_of_equally_near_samples_the_earlier_come_first(alone: OnRanks, together: list[OnRanks]) -> None:
    others = [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    for rank in (alone, *together):
        similarity, samples = rank.nearest
        assert samples.tolist() == [[*others, 3], [3, *others]]
        assert similarity[0].tolist() == pytest.approx([1.0] * 10 + [0.6])
        assert similarity[1].tolist() == pytest.approx([-0.6] + [-1.0] * 10)


@given(arrays(np.float32, (2, 9), elements=st.floats(-2, 2, width=32)))
def test_keys_sort_as_their_similarities_and_give_them_back(similarity: np.ndarray) -> None:
    keys = knn.pack(torch.from_numpy(similarity), first=1000)
    values, samples = knn.unpack(keys)
    assert np.array_equal(values.numpy(), similarity)
    assert samples.tolist() == [list(range(1000, 1009))] * 2
    order = keys.argsort(dim=1, descending=True).numpy()
    assert np.array_equal(order, np.argsort(-similarity, axis=1, kind="stable"))


def test_a_class_that_no_neighbour_has_is_never_a_guess() -> None:
    keys = knn.pack(torch.tensor([[0.9, 0.8]]), first=0)
    labels = torch.tensor([2, 2])
    for right, hits in ((2, [[1, 1]]), (0, [[0, 0]])):
        assert knn.voted(keys, labels, torch.tensor([right]), 3, [2], 0.07).tolist() == hits


@pytest.mark.spawn
@pytest.mark.parametrize("l2", L2S)
def test_the_linear_probe_is_at_the_optimum_of_logistic_regression(
    alone: OnRanks, together: list[OnRanks], l2: float
) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    values, labels = (part[7:] for part in clouds(311, seed=1))
    scaled = StandardScaler().fit_transform(values.astype(np.float64))
    reference = LogisticRegression(C=1 / (l2 * len(values)), tol=1e-9, max_iter=10_000).fit(scaled, labels)
    for found in (rank.fits[l2] for rank in (alone, *together)):
        assert found.converged
        assert np.allclose(found.weight, reference.coef_, atol=1e-3)
        shift = found.bias.numpy() - reference.intercept_  # softmax does not see a shift of all
        assert np.allclose(shift, shift.mean(), atol=1e-3)


@pytest.mark.spawn
def test_the_sweep_chooses_on_what_is_held_out_and_counts_on_the_validation_split(
    alone: OnRanks, together: list[OnRanks]
) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    one = alone.probe
    assert [tried.l2 for tried in one.sweep] == [10.0, 1e-2, 1e-4]
    best = max(one.sweep, key=lambda tried: (tried.top1, tried.l2))
    assert one.l2 == best.l2
    assert one.at_the_edge == (best.l2 != 1e-2)
    (values, labels), (queries, right) = clouds(311, seed=1), clouds(97, seed=2)
    scaler = StandardScaler().fit(values.astype(np.float64))
    reference = LogisticRegression(C=1 / (one.l2 * 311), tol=1e-9, max_iter=10_000)
    score = reference.fit(scaler.transform(values), labels).score(scaler.transform(queries), right)
    assert one.top1 == pytest.approx(100 * score)
    assert one.top5 > one.top1
    for result in (rank.probe for rank in together):
        assert (result.l2, result.top1, result.top5) == (one.l2, one.top1, one.top5)
        assert [tried.top1 for tried in result.sweep] == [tried.top1 for tried in one.sweep]


@pytest.mark.spawn
def test_a_tenth_is_held_out_whatever_the_number_of_ranks(alone: OnRanks, together: list[OnRanks]) -> None:
    assert int(alone.held_out.sum()) == 31
    assert torch.equal(torch.cat([rank.held_out for rank in together]), alone.held_out)


@pytest.mark.spawn
def test_a_training_split_too_small_for_a_linear_probe_is_named(alone: OnRanks, together: list[OnRanks]) -> None:
    for rank in (alone, *together):
        assert "8 training samples of 6 classes are too few" in rank.too_few


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "crate_dist.probe", *map(str, arguments)]
    return subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a model that nobody trained: its features tell casts of colour apart all the same."""
    path, net = tmp_path_factory.mktemp("weights") / "model.pt", model()
    export_model(path, net.config, net.state_dict(), {"eval_crop": 1.0})
    return path


@pytest.mark.spawn
def test_both_commands_say_and_write_what_they_measured(cast_shards: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    ks = ("--k", 20, 5, 500, 900)
    done = command("knn", weights, "--data", cast_shards, *ks, "--layer", 2, "--pool", "mean", "--json", out)
    assert done.returncode == 0, done.stderr
    assert "mean of the tokens after layer 2 of 4" in done.stdout
    written = json.loads(out.read_text())
    assert [result["k"] for result in written["results"]] == [5, 20, 200]  # of 200 samples
    assert "all there are" in done.stdout
    assert (written["train_samples"], written["val_samples"], written["layer"]) == (200, 37, 2)
    for result in written["results"]:
        assert f"{result['k']}-NN: top-1 {result['top1']:.2f} %" in done.stdout
        assert result["top1"] > 50 or result["k"] == 200  # of four classes
    done = command("linear", weights, "--data", cast_shards, "--l2", 1e-2, 1e-3, "--json", out)
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text())
    assert f"linear probe: top-1 {written['top1']:.2f} %" in done.stdout
    assert [tried["l2"] for tried in written["sweep"]] == [1e-2, 1e-3]
    assert written["top1"] > 80


def test_what_cannot_be_probed_is_named(
    cast_shards: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_split(tmp_path / "other", casts(12, seed=3), shard_samples=60, classes=5)
    (tmp_path / "train").symlink_to(cast_shards / "train")
    for arguments, expected in (
        (("--split", "train"), "find itself"),
        (("--split", "nothing"), "no folder"),
        (("--data", tmp_path, "--split", "other", "--k", 5), "do not have the same classes"),
        (("--layer", 9), "layers 1 to 4"),
        (("--json", tmp_path / "nowhere" / "out.json"), "no folder to write in"),
    ):
        assert main(["knn", *map(str, (weights, "--data", cast_shards, *arguments))]) == 1
        assert expected in capsys.readouterr().err
