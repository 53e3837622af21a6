"""The numbers of the white box are the published ones, and taking them changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crate_dist.config.parts import MIXERS, TOKENWISE
from crate_dist.errors import UserError
from crate_dist.models.build import initialise
from crate_dist.models.config import ModelConfig
from crate_dist.models.mixers.attention import Attention
from crate_dist.models.rates import Measures, coding_rate, coherence, dead_token_share
from crate_dist.models.residuals.crate import CrateLayer
from crate_dist.models.tokenwise.ista import ISTA
from crate_dist.models.transformer import Transformer
from crate_dist.models.weights.names import from_reference
from crate_dist.whitebox.maps import patch_keys, token_maps
from crate_dist.whitebox.measures import layer_gradient_norms, profile
from tests.new_parts import add_part

GOLDEN = Path(__file__).parents[1] / "golden" / "crate_parity.pt"
SMALL = ModelConfig(image_size=16, patch_size=4, num_classes=7, dim=24, depth=3, heads=3, dropout=0.5, emb_dropout=0.5)


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return torch.load(GOLDEN, weights_only=True)


@pytest.fixture
def model(golden: dict[str, Any]) -> Transformer:
    model = Transformer(ModelConfig(**{key: value for key, value in golden["config"].items() if key != "dim_head"}))
    model.load_state_dict(from_reference(golden["state_dict"]))
    return model


def images(*sides: int) -> Tensor:
    return torch.randn(2, 3, *sides, generator=torch.Generator().manual_seed(0))


def test_coding_rate_and_sparsity_are_those_of_the_published_code(model: Transformer, golden: dict[str, Any]) -> None:
    seen = profile(model, [golden["images"]])
    means, stds = zip(*golden["coding_rate"], strict=True)
    assert seen.mean("coding_rate").tolist() == pytest.approx(means, rel=1e-5)
    assert seen.std("coding_rate").tolist() == pytest.approx(stds, rel=1e-3)
    assert seen.mean("zeros").tolist() == pytest.approx(golden["sparsity_zero_fraction"], abs=1e-6)
    shares = (golden["features"] == 0).double().mean(dim=(2, 3))
    assert seen.std("zeros").tolist() == pytest.approx(shares.std(dim=1, correction=0).tolist(), abs=1e-6)
    assert seen.means()["coding_rate"] == pytest.approx(means, rel=1e-5)


def test_class_attention_is_that_of_the_published_code(model: Transformer, golden: dict[str, Any]) -> None:
    maps = token_maps(model, golden["images"]).layers
    assert maps.shape == (3, 4, 4, 4, 4)  # layers, images, heads, rows, columns
    assert torch.allclose(maps.flatten(-2), golden["attention"][:, :, :, 0, 1:], atol=1e-5)


def test_in_one_batch_or_in_several_the_profile_is_the_same(model: Transformer, golden: dict[str, Any]) -> None:
    whole, parts = profile(model, [golden["images"]]), profile(model, list(golden["images"].split(1)))
    assert whole.values.keys() == parts.values.keys()
    for name, tensor in whole.values.items():
        assert torch.allclose(tensor, parts[name], rtol=1e-5, atol=1e-9), name
    assert torch.equal(profile(model, [golden["images"][:1]]).std("coding_rate"), torch.zeros(3).double())


@pytest.mark.parametrize(("tokens", "width"), [(5, 12), (12, 5)])
def test_coding_rate_is_the_log_determinant_and_knows_no_rotation(tokens: int, width: int) -> None:
    w = torch.randn(2, 3, tokens, width)
    unit = F.normalize(w.double(), dim=-1)
    direct = torch.logdet(torch.eye(tokens) + width / (tokens * 0.01) * unit @ unit.mT).sum(dim=1) / 2
    assert torch.allclose(coding_rate(w), direct, rtol=1e-6)
    turned = w.double() @ torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    assert torch.allclose(coding_rate(3 * turned), coding_rate(w), rtol=1e-6)


def test_dead_tokens_are_counted_and_do_not_spoil_the_coding_rate() -> None:
    w = torch.randn(2, 3, 6, 4)
    w[0, :, 2:] = 0
    rate = coding_rate(w)
    assert bool(torch.isfinite(rate).all())
    assert rate[0] < rate[1]
    features = torch.ones(2, 6, 12)
    features[0, 2:] = 0
    assert dead_token_share(features).tolist() == pytest.approx([4 / 6, 0])
    assert bool(coding_rate(torch.full((1, 1, 3, 4), torch.nan)).isnan().all())


def test_a_layer_without_its_dictionary_is_seen_to_be_dead() -> None:
    model = initialise(SMALL, seed=0)
    with torch.no_grad():
        layer = model.layers[1]
        assert isinstance(layer, CrateLayer)
        layer.ista.dictionary.zero_()  # type: ignore[union-attr,operator]
        layer.ista_norm.weight.zero_()  # type: ignore[union-attr,operator]
    seen = profile(model, [images(16, 16)])
    assert seen["zeros"][:, 0].tolist()[1] == 1
    assert seen.mean("dead_tokens").tolist()[1] == 1
    assert [seen["dead_features"][1].item(), seen["coherence"][1].item()] == [1, 0]
    assert seen["dead_tokens"][0].max() == 0


def test_coherence_is_the_largest_cosine_of_two_columns() -> None:
    atoms = torch.tensor([[2.0, 0, 1, 0], [0, 3, 1, 0]])
    assert coherence(atoms).item() == pytest.approx(0.5**0.5)
    assert coherence(-5 * torch.eye(4)).item() == 0
    assert coherence(torch.tensor([[1.0, -2], [1, -2]])).item() == pytest.approx(1)


def test_gradient_norms_are_those_of_a_backward_pass() -> None:
    model = initialise(SMALL, seed=0)
    labels = torch.tensor([1, 5])
    norms = layer_gradient_norms(model, images(16, 16), labels, label_smoothing=0.1)
    assert all(parameter.grad is None for parameter in model.parameters())
    F.cross_entropy(model.eval()(images(16, 16)), labels, label_smoothing=0.1).backward()
    for layer, norm in zip(model.layers, norms, strict=True):
        gradients = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
        squares = [gradient.double().square().sum() for gradient in gradients]
        assert norm.item() == pytest.approx(torch.stack(squares).sum().sqrt().item(), rel=1e-5)


def test_measuring_leaves_weights_mode_and_random_state_as_they_were() -> None:
    model = initialise(SMALL, seed=0).train()
    before, state = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    first = profile(model, [images(16, 16)])
    layer_gradient_norms(model, images(16, 16), torch.tensor([0, 1]))
    assert torch.equal(profile(model, [images(16, 16)])["coding_rate"], first["coding_rate"])  # no dropout in it
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_pictures_of_any_size_in_whole_patches_are_measured() -> None:
    model = initialise(SMALL, seed=0).eval()
    wide = images(12, 24)
    assert token_maps(model, wide).layers.shape == (3, 2, 3, 3, 6)
    assert patch_keys(model, wide, 2).shape == (2, 3, 6, 24)
    assert profile(model, [wide])["coding_rate"].shape == (3, 2)
    square = images(16, 16)
    assert torch.equal(model.forward_intermediates(square).logits, model(square))
    with pytest.raises(ValueError, match=r"multiples of 4, got \(2, 3, 12, 18\)"):
        profile(model, [images(12, 18)])


class Sparse(ISTA):
    """A token-wise part with a code, and one parameter that is not trained and one that nothing reads."""

    key = "sparse"
    found: ClassVar[Measures] = {}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.fixed = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        self.idle = torch.nn.Parameter(torch.ones(3))

    def measures(self, z: Tensor) -> Measures:
        """Returns what the test says."""
        return dict(self.found)


class Coordinates(Attention):
    """A mixer with coordinates that is no SubspaceMixer."""

    key = "coordinates"

    def coordinates(self, w: Tensor) -> Tensor:
        """Returns the queries."""
        return w[:, 0]


@pytest.fixture
def of_new_parts(monkeypatch: pytest.MonkeyPatch) -> Transformer:
    add_part(monkeypatch, TOKENWISE, "sparse", Sparse)
    add_part(monkeypatch, MIXERS, "coordinates", Coordinates)
    return initialise(replace(SMALL, tokenwise="sparse", mixer="coordinates"), seed=0)


def test_what_a_part_does_not_measure_is_told(of_new_parts: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sparse, "found", {"lasso": torch.ones(2), "one": 1.5, "each_head": torch.ones(2, 3)})
    seen = profile(of_new_parts, [images(16, 16)] * 2)
    assert {"coding_rate", "zeros", "dead_features", "lasso"} <= seen.values.keys()
    assert {name: list(seen[name].shape) for name in Sparse.found} == {
        "lasso": [3, 4],
        "one": [3],
        "each_head": [3, 4, 3],
    }
    assert seen.means()["one"] == [1.5] * 3
    assert seen.what_is_missing() == [
        "Coordinates does not measure it: no subspace_coherence, orthonormality_error, out_alignment",
        "Sparse does not measure it: no coherence",
    ]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"zeros": torch.ones(2)}, '"zeros" is measured by Sparse and by the white box'),
        ({"dead_features": torch.ones(2)}, '"dead_features" is measured by Sparse and by the white box'),
        ({"gradient_norm": torch.ones(2)}, '"gradient_norm" is measured by Sparse and by the white box'),
        ({"coherence": None}, '"coherence", which Sparse measures, is a NoneType: a measure is one number of each'),
        ({"rate": torch.ones(3)}, r'"rate", which Sparse measures, is a tensor \(3,\): .* each image, \(2,\) here'),
        ({"rate": torch.ones(2, 4, 4)}, r"is a tensor \(2, 4, 4\)"),
    ],
)
def test_a_measure_that_takes_another_s_name_or_is_no_number_is_refused_by_name(
    of_new_parts: Transformer, monkeypatch: pytest.MonkeyPatch, found: Measures, said: str
) -> None:
    monkeypatch.setattr(Sparse, "found", found)
    with pytest.raises(UserError, match=said):
        profile(of_new_parts, [images(16, 16)])


def test_two_parts_that_call_their_measures_alike_are_both_named(
    of_new_parts: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sparse, "found", {"rate": torch.ones(2)})
    monkeypatch.setattr(Coordinates, "measures", lambda self, w: {"rate": torch.ones(2)})
    with pytest.raises(
        UserError, match=r'"rate" is measured by Coordinates and by Sparse, .* `measures` of Coordinates'
    ):
        profile(of_new_parts, [images(16, 16)])
    monkeypatch.setattr(Coordinates, "measures", lambda self, w: {})
    monkeypatch.setattr(of_new_parts.layers[1].get_submodule("sparse"), "found", {"rate": "this layer has none"})
    with pytest.raises(UserError, match=r'"rate" is measured of some layers .* of others not: this layer has none'):
        profile(of_new_parts, [images(16, 16)])


def test_gradients_of_what_is_not_trained_or_not_read_add_nothing(of_new_parts: Transformer) -> None:
    norms = layer_gradient_norms(of_new_parts, images(16, 16), torch.tensor([1, 5]))
    F.cross_entropy(of_new_parts.eval()(images(16, 16)), torch.tensor([1, 5])).backward()
    squares = [
        sum(p.grad.square().sum() for p in layer.parameters() if p.grad is not None) for layer in of_new_parts.layers
    ]
    assert norms.square().tolist() == pytest.approx([float(square) for square in squares], rel=1e-5)
