"""What is measured of each model of the family is what its paper defines, by its published code's values."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from crate_dist.api.model import Model
from crate_dist.api.preprocess import Preprocess
from crate_dist.config import ImageSection, load_recipe
from crate_dist.config.archs import ARCHS
from crate_dist.config.parts import MIXERS, Part
from crate_dist.errors import UserError
from crate_dist.evaluation.features import check_pool, pooled
from crate_dist.evaluation.on_ranks import CannotMeasure
from crate_dist.figures.__main__ import main
from crate_dist.models.build import initialise
from crate_dist.models.config import ModelConfig
from crate_dist.models.mixers.cbsa import CBSA
from crate_dist.models.mixers.mssa import MSSA
from crate_dist.models.mixers.tssa import TSSA
from crate_dist.models.rates import alignment, coding_rate, coherence, entropy, orthonormality_error, subspace_coherence
from crate_dist.models.tokenwise.odl import ODL
from crate_dist.models.transformer import Transformer
from crate_dist.models.weights.names import from_reference
from crate_dist.models.weights.write import export_model
from crate_dist.training.dashboard import charts, measure_titles
from crate_dist.whitebox.maps import patch_keys, token_maps
from crate_dist.whitebox.measures import profile

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILY = {
    "crate_alpha": ("crate_alpha_base", {"dim": 48, "heads": 4, "image_size": 32}),
    "tost": ("tost_tiny_12", {"dim": 64, "heads": 4, "image_size": 32}),
    "cbsa": ("cbt_tiny", {"dim": 48, "heads": 3, "image_size": 80}),
    "vit": ("vit_tiny", {"dim": 48, "heads": 4, "image_size": 32}),
}


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, Any]]:
    return {name: torch.load(GOLDEN / f"{name}_parity.pt", weights_only=True) for name in FAMILY}


@pytest.fixture(scope="module")
def models(golden: dict[str, dict[str, Any]]) -> dict[str, Transformer]:
    built = {}
    for name, (arch, other) in FAMILY.items():
        built[name] = Transformer(
            ModelConfig(**asdict(ARCHS[arch]) | {"depth": 3, "patch_size": 8, "num_classes": 10} | other)
        )
        built[name].load_state_dict(from_reference(golden[name]["state_dict"]))
        built[name].eval()
    return built


def near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-6)


def test_what_is_sparse_in_alpha_is_its_code(models: dict[str, Transformer], golden: dict[str, dict[str, Any]]) -> None:
    """Computed from the published tokens by the paper's formula: z1, z2 with η = λ = 0.1."""
    model, values = models["crate_alpha"], golden["crate_alpha"]
    seen = profile(model, [values["images"]])
    assert "gradient_norm" not in seen
    for layer, (block, features) in enumerate(zip(model.layers, values["features"], strict=True)):
        odl = block.get_submodule("odl")
        assert isinstance(odl, ODL)
        d, d1 = odl.dictionary.detach(), odl.out.detach()
        before = features - values["odl_outputs"][layer]  # what the ODL's norm reads
        x = block.get_submodule("odl_norm")(before)
        z1 = (0.1 * x @ d - 0.01).relu()
        z2 = (z1 - 0.1 * (z1 @ d.T - x) @ d - 0.01).relu()
        assert near(z2 @ d1.T, values["odl_outputs"][layer])
        assert seen["zeros"][layer].tolist() == pytest.approx((z2 == 0).double().mean(dim=(1, 2)).tolist(), abs=1e-4)
        assert seen["dead_features"][layer].item() == pytest.approx(
            (z2 == 0).all(dim=1).all(dim=0).double().mean().item()
        )
        assert near(seen["coherence"][layer], coherence(d))
        assert near(seen["decoder_coherence"][layer], coherence(d1))
        assert near(seen["decoder_alignment"][layer], (d * d1).sum() / d.norm() / d1.norm())


def test_tosts_membership_and_rate_are_those_of_its_paper(
    models: dict[str, Transformer], golden: dict[str, dict[str, Any]]
) -> None:
    model, values = models["tost"], golden["tost"]
    seen = profile(model, [values["images"]])
    maps = token_maps(model, values["images"])
    assert maps.kind == "membership"
    assert maps.head is not None
    for layer, (membership, gate) in enumerate(zip(values["membership"], values["channel_gate"], strict=True)):
        assert near(maps.layers[layer].flatten(-2), membership)
        assert near(seen["membership"][layer], membership.mean(dim=-1))
        uncertain = -(membership * membership.log()).sum(dim=1).mean(dim=-1) / np.log(4)
        assert near(seen["membership_entropy"][layer], uncertain)
        power = 1 / gate.double() - 1  # the second moments; ½ n_k / n Σ_i log(1 + m_ki)
        rate = membership.double().mean(dim=-1) * (1 + power).log().sum(dim=-1) / 2
        assert torch.allclose(seen["head_rate"][layer], rate, rtol=1e-3)
        assert near(seen["variational_rate"][layer], seen["head_rate"][layer].sum(dim=-1))
    for block, attention in enumerate(values["cls_attention"]):
        assert near(maps.head[block].flatten(-2), attention[..., 1:])
    assert torch.equal(maps.looks(0), maps.head[-1])
    assert maps.even.unique().tolist() == [0.25]


def test_cbsas_map_and_representatives_are_the_published_ones(
    models: dict[str, Transformer], golden: dict[str, dict[str, Any]]
) -> None:
    model, values = models["cbsa"], golden["cbsa"]
    images = values["images"]
    seen, maps, inside = profile(model, [images]), token_maps(model, images), model.forward_intermediates(images)
    for layer, (attention, contraction) in enumerate(zip(values["attention"], values["contraction"], strict=True)):
        assert near(maps.layers[layer].flatten(-2), attention[..., 0, 1:])
        assert near(maps.even[layer], attention[..., 0, :].mean(dim=-1))
        w = inside.projections[layer].detach()
        before = torch.nn.functional.adaptive_avg_pool2d(
            w[:, :, :-1].unflatten(2, (10, 10)).permute(0, 1, 4, 2, 3).flatten(1, 2), 8
        )
        before = before.flatten(2).unflatten(1, (3, 16)).mT
        step = model.layers[layer].get_submodule("cbsa").get_parameter("step_rep").detach()
        after = before + step * contraction @ w
        assert near(seen["representatives_rate"][layer], coding_rate(before))
        assert torch.allclose(
            seen["representatives_rate_change"][layer], coding_rate(after) - coding_rate(before), atol=1e-2
        )
        gram = torch.eye(101) + 16 / (101 * 0.01) * (w @ w.mT).double()  # the published code's, without normalising
        assert near(seen["coding_rate_with_lengths"][layer], torch.logdet(gram).sum(dim=1) / 2)


def test_a_model_says_what_it_does_not_have(models: dict[str, Transformer], golden: dict[str, dict[str, Any]]) -> None:
    seen = profile(models["vit"], [golden["vit"]["images"]])
    assert list(seen.values) == ["token_coding_rate"]
    assert seen.what_is_missing() == [
        "Attention has no subspaces: no coding_rate, coding_rate_change, subspace_coherence, orthonormality_error, "
        "out_alignment",
        "MLP makes no sparse code (the exact GELU is zero almost nowhere): no zeros, dead_tokens, dead_features, "
        "coherence",
    ]
    one = initialise(ModelConfig(image_size=16, patch_size=8, num_classes=2, dim=12, depth=1, heads=1), seed=0)
    assert profile(one, [torch.rand(1, 3, 16, 16)]).missing == {
        "subspace_coherence": "there is one subspace",
        "out_alignment": "there is no W behind a single head",
    }


def test_the_rate_of_the_tokens_is_of_what_the_mixer_reads(
    models: dict[str, Transformer], golden: dict[str, dict[str, Any]]
) -> None:
    model, images = models["vit"], golden["vit"]["images"]
    z = model.layers[0].get_submodule("attention_norm")(model.embed(images)).detach().double()
    unit = z / z.norm(dim=-1, keepdim=True)
    direct = torch.logdet(torch.eye(48) + 48 / (17 * 0.01) * unit.mT @ unit) / 2
    assert near(profile(model, [images])["token_coding_rate"][0], direct)


def test_subspaces_are_known_to_be_the_same_orthogonal_and_orthonormal() -> None:
    basis = torch.linalg.qr(torch.randn(12, 12)).Q
    apart = 3 * basis.unflatten(0, (3, 4))
    assert subspace_coherence(apart).item() == pytest.approx(0, abs=1e-6)
    assert orthonormality_error(apart).item() == pytest.approx(0, abs=1e-6)
    turned = torch.stack([basis[:4], torch.linalg.qr(torch.randn(4, 4)).Q @ basis[:4]])
    assert subspace_coherence(turned).item() == pytest.approx(1)
    half = torch.stack([basis[:4], basis[2:6]])
    assert subspace_coherence(half).item() == pytest.approx(0.5)
    assert orthonormality_error(torch.ones(2, 4, 12)).item() == pytest.approx(3**0.5)
    assert subspace_coherence(torch.zeros(2, 4, 12)).item() == 0


def test_alignment_and_entropy_have_their_ends() -> None:
    a = torch.randn(3, 5)
    assert alignment(a, 7 * a).item() == pytest.approx(1)
    assert alignment(a, -a).item() == pytest.approx(-1)
    assert entropy(torch.tensor([[1.0, 0, 0], [2, 2, 2]]), dim=1).tolist() == pytest.approx([0, 1])
    assert entropy(torch.ones(2, 1), dim=1).tolist() == [0, 0]


def test_where_w_comes_back_from_the_subspaces_it_is_aligned() -> None:
    config = ModelConfig(image_size=16, patch_size=4, num_classes=2, dim=24, depth=1, heads=3)
    for mixer in (MSSA(config), TSSA(config)):
        with torch.no_grad():
            mixer.get_parameter("out.weight").copy_(0.2 * mixer.get_parameter("subspaces.weight").T)
        aligned = mixer.measures(torch.randn(2, 3, 5, 8))["out_alignment"]
        assert isinstance(aligned, Tensor)
        assert aligned.item() == pytest.approx(1)


@torch.no_grad()
@pytest.mark.parametrize("flipped", [[0], [0, 1, 2]])
def test_the_alignment_of_cbsa_is_of_what_it_computes_and_not_of_how_its_factors_share_it(flipped: list[int]) -> None:
    torch.manual_seed(0)
    mixer = CBSA(ModelConfig(image_size=16, patch_size=4, num_classes=2, dim=24, depth=1, heads=3, mixer="cbsa"))
    z, w = torch.randn(2, 17, 24), torch.randn(2, 3, 17, 8)
    out, before = mixer(z), mixer.measures(w)["out_alignment"]
    weight = mixer.get_parameter("out.weight")
    for head in flipped:
        mixer.step_x[head] *= -4
        weight.unflatten(1, (3, 8))[:, head] *= -0.25
    assert torch.equal(mixer(z), out)
    after = mixer.measures(w)["out_alignment"]
    assert isinstance(before, Tensor)
    assert isinstance(after, Tensor)
    assert after.item() == pytest.approx(before.item(), rel=1e-6)
    weight.copy_(0.2 * mixer.get_parameter("subspaces.weight").T / mixer.step_x.flatten().repeat_interleave(8))
    aligned = mixer.measures(w)["out_alignment"]
    assert isinstance(aligned, Tensor)
    assert aligned.item() == pytest.approx(1)


def test_maps_are_the_published_ones_where_there_is_attention(
    models: dict[str, Transformer], golden: dict[str, dict[str, Any]]
) -> None:
    for name in ("crate_alpha", "vit"):
        maps = token_maps(models[name], golden[name]["images"])
        assert near(maps.layers.flatten(-2), torch.stack(list(golden[name]["attention"]))[..., 0, 1:]), name
        assert torch.allclose(maps.even, torch.tensor(1 / 17)), name
        assert maps.head is None


def test_figures_without_attention_show_membership_and_the_heads_own(
    models: dict[str, Transformer],
    golden: dict[str, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, values = models["tost"], golden["tost"]
    export_model(tmp_path / "tost.pt", model.config, model.state_dict())
    torch.save({"imgs": values["images"][:1]}, tmp_path / "images.pt")
    for figure in ("attention", "layers", "mask"):
        command = [figure, str(tmp_path / "tost.pt"), "--images", str(tmp_path / "images.pt"), "--dpi", "40"]
        assert main([*command, "--out", str(tmp_path)]) == 0
    assert "; MLP makes no sparse code (the exact GELU is zero almost nowhere): no zeros, " in capsys.readouterr().out
    with np.load(tmp_path / "attention.npz") as numbers:
        drawn, head = numbers["01-images-000"].reshape(3, 4, 16), numbers["01-images-000/head"].reshape(2, 4, 16)
    assert np.allclose(drawn, torch.stack(values["membership"])[:, 0], atol=1e-5)
    assert np.allclose(head, torch.stack(values["cls_attention"])[:, 0, :, 1:], atol=1e-5)
    with np.load(tmp_path / "layers.npz") as numbers:
        assert numbers["head_rate_of_images"].shape == (3, 1, 4)
    written = {path.name for path in tmp_path.iterdir()}
    assert {"membership-layers.png", "attention-head.png", "layers-measures.png", "mask.png"} <= written


def test_keys_are_those_of_attention_and_patches_without_a_class_token(
    models: dict[str, Transformer], golden: dict[str, dict[str, Any]]
) -> None:
    vit, values = models["vit"], golden["vit"]
    inside = vit.forward_intermediates(values["images"])
    w = inside.projections[2]
    looks = (w[:, 0, :, :1] @ w[:, 1].mT / 12**0.5).softmax(dim=-1)[..., 0, 1:]
    assert near(looks.detach(), values["attention"][2][..., 0, 1:])
    assert near(patch_keys(vit, values["images"], 2).flatten(1, 2), w[:, 1, :, 1:].transpose(1, 2).flatten(2).detach())
    assert patch_keys(models["tost"], golden["tost"]["images"], 0).shape == (4, 4, 4, 64)


@torch.no_grad()
def test_features_are_what_the_linear_map_of_each_head_reads(
    models: dict[str, Transformer], golden: dict[str, dict[str, Any]]
) -> None:
    for name, model in models.items():
        features = pooled(model, golden[name]["images"], 3)
        assert near(model.head.linear(features), golden[name]["logits"]), name
    assert near(pooled(models["vit"], golden["vit"]["images"], 3), golden["vit"]["pooled"][0])
    for name, pool in (("tost", "cls"), ("vit", "mean")):
        with pytest.raises(CannotMeasure, match=f'--pool {pool}: the features of head = ".*leave --pool out'):
            check_pool(models[name].config, pool)  # type: ignore[arg-type]


@torch.no_grad()
def test_one_image_without_a_batch_is_seen_as_in_one(
    models: dict[str, Transformer], golden: dict[str, dict[str, Any]]
) -> None:
    for name, model in models.items():
        images = golden[name]["images"]
        many = model.forward_intermediates(images)
        one = Model(model.config, model.state_dict(), Preprocess(32, ImageSection()), "", None, None).intermediates(
            images[1]
        )
        assert near(one.features[1], many.features[1][1])
        if name == "tost":
            with pytest.raises(ValueError, match="TSSA has no map of tokens that look at each other"):
                one.attention(1)
        else:
            assert near(one.attention(1), many.attention(1)[1])
            assert near(one.class_attention(1), many.class_attention(1)[1])


def test_a_part_of_ones_own_has_charts_titles_and_no_faked_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator is a file and a row; what it measures is seen without another line."""

    class Mean(MSSA):
        key = "mean"

        def attend(self, w: Tensor) -> Tensor:
            return self.out(w.mean(dim=2, keepdim=True).expand_as(w).transpose(1, 2).flatten(2))

        def attention(self, w: Tensor, queries: slice = slice(None)) -> None:  # type: ignore[override]
            return None

        def measures(self, w: Tensor) -> dict[str, Tensor | str]:
            return {"length_of_the_mean": w.mean(dim=2).norm(dim=-1)}

    monkeypatch.setattr("crate_dist.models.mixers.mssa.Mean", Mean, raising=False)
    monkeypatch.setitem(MIXERS, "mean", Part("mixers.mssa.Mean"))
    config = ModelConfig(image_size=16, patch_size=4, num_classes=2, dim=24, depth=2, heads=3, mixer="mean")
    model, images = initialise(config, seed=0), torch.rand(2, 3, 16, 16)
    seen = profile(model, [images, images])
    assert seen["length_of_the_mean"].shape == (2, 4, 3)
    assert seen.mixer == "Mean"
    recipe = load_recipe("crate_tiny", ["model.mixer=mean"])
    titles = measure_titles(recipe, ["whitebox/length_of_the_mean", "whitebox/coding_rate"])
    assert list(titles.values()) == ["length of the mean", "coding rate of what Mean reads [nats]"]
    layers = charts(str, measures=titles)["white box, layer by layer"]
    assert layers["length of the mean"] == r"whitebox/length_of_the_mean/layer-\d+"
    with pytest.raises(UserError, match="Mean has neither an attention map nor a membership"):
        token_maps(model, images)
