"""The numbers of the white box are the published ones, and taking them changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crate_dist.models.build import initialise
from crate_dist.models.config import ModelConfig
from crate_dist.models.rates import coding_rate, coherence, dead_token_share
from crate_dist.models.residuals.crate import CrateLayer
from crate_dist.models.transformer import Transformer
from crate_dist.models.weights.names import from_reference
from crate_dist.whitebox.maps import patch_keys, token_maps
from crate_dist.whitebox.measures import layer_gradient_norms, profile

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
