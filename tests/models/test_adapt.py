"""Weights of one model begin another: what fits is taken, what can be fitted is, and the rest is named."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from crate_dist.config import ModelSection, load_recipe
from crate_dist.config.parts import STEMS, TOKENWISE
from crate_dist.models.adapt import adapt, map_head
from crate_dist.models.build import build_model, initialise, model_config
from crate_dist.models.config import ModelConfig
from crate_dist.models.stems.patches import PatchEmbedding
from crate_dist.models.stems.stem import Stem
from crate_dist.models.tokenwise.ista import ISTA
from crate_dist.models.transformer import Transformer
from crate_dist.models.weights.names import WeightsError
from crate_dist.models.weights.read import load_model
from tests.new_parts import add_part

SOURCE = model_config(ModelSection(arch="crate_demo", image_size=32, patch_size=8), num_classes=10)

PUBLISHED = Path(__file__).parents[1] / "golden" / "crate_reference_checkpoint.pth.tar"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return initialise(SOURCE, seed=5).state_dict()


def test_at_the_same_size_everything_is_taken_as_it_is(weights: dict[str, Tensor]) -> None:
    adapted = adapt(weights, SOURCE, SOURCE, new_head=False)
    assert adapted.notes == ()
    assert adapted.state_dict.keys() == weights.keys()
    assert all(torch.equal(adapted.state_dict[name], weights[name]) for name in weights)


def test_a_new_head_is_the_new_model_s_own_and_nothing_else_is(weights: dict[str, Tensor]) -> None:
    target = replace(SOURCE, num_classes=3)
    adapted = adapt(weights, SOURCE, target, new_head=True)
    assert weights.keys() - adapted.state_dict.keys() == {
        "head.norm.weight",
        "head.norm.bias",
        "head.linear.weight",
        "head.linear.bias",
    }
    assert adapted.notes == ("head new, 10 classes there and 3 here",)
    Transformer(target).load_state_dict(adapted.state_dict, strict=False)


@pytest.mark.parametrize(
    ("arch", "keeps_its_norm"),
    [
        ("crate_tiny", False),
        ("cbsa_tost_tiny", False),
        ("cbt_tiny", False),
        ("crate_alpha_base", True),
        ("tost_tiny_12", True),
        ("vit_tiny", True),
    ],
)
def test_a_new_head_has_new_what_the_published_fine_tuning_of_its_family_makes_new(
    arch: str, keeps_its_norm: bool
) -> None:
    named = model_config(ModelSection(arch=arch, image_size=32, patch_size=8), num_classes=10)
    source = replace(named, dim=48, depth=1, heads=2)
    weights = initialise(source, seed=5).state_dict()
    taken = adapt(weights, source, replace(source, num_classes=3), new_head=True).state_dict
    norm, linear = ({f"head.{part}.weight", f"head.{part}.bias"} for part in ("norm", "linear"))
    assert weights.keys() - taken.keys() == (linear if keeps_its_norm else norm | linear)


def test_positions_of_another_grid_are_interpolated_and_the_class_token_s_is_kept(weights: dict[str, Tensor]) -> None:
    adapted = adapt(weights, SOURCE, replace(SOURCE, image_size=48), new_head=False)
    assert adapted.notes == ("positions interpolated from 4 x 4 to 6 x 6 patches",)
    positions = adapted.state_dict["pos_embedding"]
    assert positions.shape == (1, 37, SOURCE.dim)
    assert torch.equal(positions[:, 0], weights["pos_embedding"][:, 0])
    assert torch.equal(weights["pos_embedding"], initialise(SOURCE, seed=5).state_dict()["pos_embedding"])


def test_half_precision_becomes_fp32(weights: dict[str, Tensor]) -> None:
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    assert {t.dtype for t in adapt(half, SOURCE, SOURCE, new_head=False).state_dict.values()} == {torch.float32}


def test_another_width_names_every_tensor_and_the_arch_that_would_fit(weights: dict[str, Tensor]) -> None:
    target = model_config(ModelSection(arch="crate_tiny", image_size=48, patch_size=8), num_classes=3)
    with pytest.raises(WeightsError) as caught:
        adapt(weights, SOURCE, target, new_head=True)
    message = str(caught.value)
    assert "--set model.arch=crate_demo" in message
    assert "layers.0-3.ista.dictionary: (96, 96) there, (384, 384) here" in message
    assert "layers.4-11.ista.dictionary: none there, (384, 384) here" in message
    for module in ("pos_embedding", "cls_token", "patch_embed.proj", "mssa.out.weight", "head.linear.weight"):
        assert module in message


def test_what_has_the_same_shapes_and_means_something_else_is_refused_or_told(weights: dict[str, Tensor]) -> None:
    with pytest.raises(WeightsError, match=r"4 heads.*2 heads"):
        adapt(weights, SOURCE, replace(SOURCE, heads=2), new_head=True)
    adapted = adapt(weights, SOURCE, replace(SOURCE, ista_step=0.2, pool="mean"), new_head=False)
    assert adapted.notes == ("pool cls there and mean here", "ista_step 0.1 there and 0.2 here")


def test_a_head_that_does_not_fit_is_not_kept(weights: dict[str, Tensor]) -> None:
    with pytest.raises(WeightsError, match=r"10 classes.*11.*init_head"):
        adapt(weights, SOURCE, replace(SOURCE, num_classes=11), new_head=False)


@pytest.mark.parametrize("new", [16, 12, 4])
def test_patches_of_another_size_that_show_the_same_are_embedded_alike(weights: dict[str, Tensor], new: int) -> None:
    changed = {name: torch.rand_like(t) if "norm_in" in name else t for name, t in weights.items()}
    target = replace(SOURCE, image_size=4 * new, patch_size=new)
    adapted = adapt(changed, SOURCE, target, new_head=False)
    assert adapted.notes == (f"patch embedding resized from 8 to {new} pixels",)
    before, after = Transformer(SOURCE), Transformer(target)
    before.load_state_dict(changed)
    after.load_state_dict(adapted.state_dict)
    coarse = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    here, there = (interpolate(coarse, (side, side), mode="bicubic") for side in (32, 4 * new))
    with torch.no_grad():
        one, other = before.patch_embed(here).flatten(), after.patch_embed(there).flatten()
    assert torch.cosine_similarity(one, other, dim=0) > 0.98


def test_weights_that_are_not_finite_are_named(weights: dict[str, Tensor]) -> None:
    broken = {**weights, "cls_token": torch.full_like(weights["cls_token"], torch.nan)}
    with pytest.raises(WeightsError, match="not finite: cls_token"):
        adapt(broken, SOURCE, SOURCE, new_head=False)


def test_adapted_features_are_those_of_the_source_up_to_the_head(weights: dict[str, Tensor]) -> None:
    source, target = (
        Transformer(SOURCE),
        build_model(ModelSection(arch="crate_demo", image_size=32, patch_size=8), 3, seed=9),
    )
    source.load_state_dict(weights)
    target.load_state_dict(adapt(weights, SOURCE, target.config, new_head=True).state_dict, strict=False)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        there, here = source.forward_intermediates(images), target.forward_intermediates(images)
    assert torch.equal(there.features[-1], here.features[-1])
    assert here.logits.shape == (2, 3)


def test_a_checkpoint_of_the_published_code_begins_a_model_of_another_resolution_and_other_classes() -> None:
    published, _ = load_model(PUBLISHED, heads=4)
    target = initialise(replace(published.config, image_size=48, num_classes=37), seed=0)
    adapted = adapt(published.state_dict(), published.config, target.config, new_head=True)
    missing = target.load_state_dict(adapted.state_dict, strict=False).missing_keys
    assert len(missing) == 4
    assert all(name.startswith("head.") for name in missing)
    theirs = torch.load(PUBLISHED, weights_only=True)["state_dict"]
    assert torch.equal(
        target.state_dict()["layers.2.ista.dictionary"], theirs["module.transformer.layers.2.1.fn.weight"]
    )


@pytest.mark.parametrize("arch", ["crate_alpha_base", "vit_tiny"])
def test_a_stem_that_is_one_map_shows_the_same_of_patches_that_grow(arch: str) -> None:
    section = ModelSection(arch=arch, width=24, depth=1, heads=2, image_size=32, patch_size=8)
    source = model_config(section, num_classes=5)
    model = initialise(source, seed=1)
    target = replace(source, patch_size=16, image_size=64)
    adapted = adapt(model.state_dict(), source, target, new_head=False)
    assert adapted.notes == ("patch embedding resized from 8 to 16 pixels",)
    grown = Transformer(target)
    grown.load_state_dict(adapted.state_dict)
    images = torch.rand(2, 3, 32, 32)
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5)  # (b, row, col, c, 8, 8)
    large = interpolate(patches.flatten(0, 2), (16, 16), mode="bicubic", antialias=True)
    large = large.view(2, 4, 4, 3, 16, 16).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 64, 64)
    assert torch.allclose(grown(large), model(images), atol=1e-4)


def test_other_parts_are_refused_and_the_same_weights_in_another_function_told() -> None:
    section = ModelSection(arch="crate_alpha_base", width=24, depth=1, heads=2, image_size=32, patch_size=8)
    source = model_config(section, num_classes=5)
    weights = initialise(source, seed=1).state_dict()
    with pytest.raises(WeightsError, match=r"layers.0.odl.dictionary: \(24, 96\) there, none here"):
        adapt(weights, source, replace(source, tokenwise="ista"), new_head=False)
    adapted = adapt(weights, source, replace(source, residual="crate"), new_head=False)
    assert adapted.notes == ("residual pre_norm there and crate here",)
    convolved = model_config(ModelSection(arch="cbt_tiny", width=24, depth=1, heads=2), num_classes=5)
    with pytest.raises(WeightsError, match=r"cannot be resized to make ones of 8; --set model\.patch_size=16"):
        adapt(initialise(convolved, seed=1).state_dict(), convolved, replace(convolved, patch_size=8), new_head=True)


class Overlapping(Stem):
    """A stem with a `proj` that is no map of patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.dim, 12, stride=config.patch_size, padding=(12 - config.patch_size) // 2)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, height, width) -> (b, patches, d)"""
        return self.proj(images).flatten(2).mT


class ByColumns(PatchEmbedding):
    """CRATE's stem with the pixels in another order, which no shape tells."""

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, height, width) -> (b, patches, d)"""
        return super().forward(images.mT)


class Unrolled(ISTA):
    """A token-wise part of several steps."""

    key = "unrolled"


def test_a_stem_of_somebody_s_own_is_resized_by_itself_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    add_part(monkeypatch, STEMS, "overlapping", Overlapping)
    add_part(monkeypatch, STEMS, "by_columns", ByColumns)
    source = replace(SOURCE, stem="overlapping")
    state = initialise(source, seed=1).state_dict()
    with pytest.raises(
        WeightsError, match=r'"overlapping" makes patches of 8 .* ones of 4; --set model\.patch_size=8 wo'
    ):
        adapt(state, source, replace(source, patch_size=4), new_head=False)
    assert adapt(state, source, replace(source, image_size=64), new_head=False).notes == (
        "positions interpolated from 4 x 4 to 8 x 8 patches",
    )
    state, columns = initialise(SOURCE, seed=1).state_dict(), replace(SOURCE, stem="by_columns")
    assert adapt(state, SOURCE, columns, new_head=True).notes[-1] == "stem patches there and by_columns here"
    with pytest.raises(
        WeightsError, match=r'of 4 for stem = "by_columns"; --set model\.stem=patches --set model\.patch_'
    ):
        adapt(state, SOURCE, replace(columns, patch_size=4), new_head=False)


def test_a_model_of_other_parts_names_the_settings_that_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    add_part(monkeypatch, TOKENWISE, "unrolled", Unrolled, options={"unroll": 2, "eta": 0.5})
    section = {"arch": "crate_demo", "image_size": 32, "patch_size": 8}
    asked = ModelSection(**section, tokenwise="unrolled", out_bias=False, options={"unroll": 3})
    source = model_config(asked, num_classes=10)
    state = initialise(source, seed=1).state_dict()
    with pytest.raises(WeightsError) as caught:
        adapt(state, source, SOURCE, new_head=False)
    message = str(caught.value)
    settings = re.findall(r"--set model\.(\S+)=(\S+)", message)
    assert dict(settings) == {"tokenwise": "unrolled", "out_bias": "false", "options.unroll": "3"}
    recipe = load_recipe("demo", [f"model.{key}={value}" for key, value in settings])
    adapt(state, source, model_config(recipe.model, num_classes=10), new_head=False)
    # Where one line of config/archs.py is another's, that is said, and a head that is to be new need not be the same.
    other = replace(SOURCE, dim=48, head="mean_patches")
    with pytest.raises(WeightsError, match=r"--set model\.width=96 would fit"):
        adapt(initialise(SOURCE, seed=1).state_dict(), SOURCE, other, new_head=True)


@pytest.mark.parametrize("new_head", [False, True])
@pytest.mark.parametrize(
    ("there", "here"),
    [
        ("class_token=false head=class_attention residual=pre_norm layer_scale=0.5", "ratio=2 tokenwise=odl"),
        ("tokenwise=mlp", "class_token=false head=class_attention residual=pre_norm layer_scale=0.5"),
        ("class_token=false pool=mean tokenwise=mlp", "tokenwise=ista"),
    ],
)
def test_the_settings_that_would_fit_are_a_recipe(there: str, here: str, new_head: bool) -> None:
    one, other = ([f"model.{text}" for text in ("depth=1 " + parts).split()] for parts in (there, here))
    source, target = (model_config(load_recipe("demo", parts).model, num_classes=10) for parts in (one, other))
    state = initialise(source, seed=1).state_dict()
    with pytest.raises(WeightsError) as caught:
        adapt(state, source, target, new_head)
    given = [text for text in other if text.partition("=")[0] in ("model.depth", "model.class_token", "model.head")]
    advised = re.findall(r"--set (\S+)", str(caught.value))
    fitting = load_recipe("demo", [*given, *advised]).model
    adapt(state, source, model_config(fitting, num_classes=10), new_head)


def test_weights_of_patches_that_the_recipe_s_stem_cannot_have_are_refused_in_words() -> None:
    source = model_config(ModelSection(arch="vit_tiny", depth=1, image_size=28, patch_size=14), num_classes=5)
    target = model_config(ModelSection(arch="cbt_tiny", depth=1, image_size=32, patch_size=8), num_classes=5)
    with pytest.raises(WeightsError, match=r"takes no patches of their size: .* not 14; .*--set model\.stem=linear "):
        adapt(initialise(source, seed=1).state_dict(), source, target, new_head=True)


def test_rows_of_a_head_without_bias_are_mapped_too() -> None:
    own = {"head.linear.weight": torch.zeros(2, 3)}
    mapped = map_head({"head.linear.weight": torch.ones(4, 3), "cls_token": torch.ones(1)}, own, [None, 2])
    assert mapped["head.linear.weight"].tolist() == [[0, 0, 0], [1, 1, 1]]
    assert mapped.keys() == {"head.linear.weight", "cls_token"}


@pytest.mark.parametrize("residual", ["crate", "pre_norm"])
@pytest.mark.parametrize("key", ["mssa", "mixer", "norms", "mssa_norm", "mssa_scale", "a.b"])
def test_a_key_that_stands_for_something_else_in_the_layer_is_refused(
    monkeypatch: pytest.MonkeyPatch, key: str, residual: str
) -> None:
    add_part(monkeypatch, TOKENWISE, "unrolled", Unrolled)
    monkeypatch.setattr(Unrolled, "key", key)
    with pytest.raises(ValueError, match=rf'Unrolled has key = "{key}", and .*: take another name'):
        Transformer(replace(SOURCE, tokenwise="unrolled", residual=residual))
