"""A model card says what is known of its weights, nothing that is not, and keeps what a person wrote."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from crate_dist.checkpoint.export import facts_of
from crate_dist.config import load_recipe
from crate_dist.config.parts import TOKENWISE
from crate_dist.data.index import ROW, Shard, ShardIndex
from crate_dist.models.build import initialise
from crate_dist.models.config import ModelConfig
from crate_dist.models.tokenwise.ista import ISTA
from crate_dist.models.tokenwise.tokenwise import TokenWise
from crate_dist.models.weights import load_model
from crate_dist.models.weights.card import card_path, model_card, write_card
from crate_dist.models.weights.files import convert
from crate_dist.models.weights.write import export_model, export_safetensors
from crate_dist.run.record import code_version
from tests.data_prep import picture
from tests.new_parts import add_part

SMALL = ModelConfig(image_size=16, patch_size=4, num_classes=7, dim=24, depth=2, heads=3)


def index_of(folder: Path, samples: int) -> ShardIndex:
    """An index that stands on disk, of shards that do not."""
    folder.mkdir(parents=True)
    shards = [Shard("a.tar", samples, 10240, "0" * 64)]
    names = [f"n{label}" for label in range(7)]
    index = ShardIndex(folder, shards, np.zeros(samples, ROW), names, names, {"layout": "class folders"})
    index.save()
    return index


@pytest.fixture
def meta(tmp_path: Path) -> dict[str, Any]:
    """As a run exports it."""
    recipe = load_recipe("crate_tiny")
    train, val = index_of(tmp_path / "shards/train", 12345), index_of(tmp_path / "shards/val", 678)
    return {
        "recipe": "crate_tiny",
        "step": 93750,
        "epochs": 150.0,
        "metrics": {"val/top1": 70.123, "val/top5": 89.5, "val/loss": 1.25},
        "evaluated_at": 93700,
        "data": facts_of(train, val),
        "recipe_values": recipe.deciding_values(),
        "code": code_version(),
        "classes": train.classes,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.1],
        "precision": "bf16",
        "eval_crop": 0.875,
        "resize_filter": "bilinear",
    }


def test_what_is_known_stands_in_the_card(tmp_path: Path, meta: dict[str, Any]) -> None:
    card = model_card("model-best.pt", SMALL, meta)
    fingerprint = meta["data"]["train"]["fingerprint"]
    parameters = sum(parameter.numel() for parameter in initialise(SMALL, seed=0).parameters())
    for line in (
        "# crate_tiny",
        f"| parameters | {parameters:,} |",
        f"| data, train | shards, 12,345 samples, 7 classes, class folders, fingerprint {fingerprint} |",
        "| steps | 93750 |",
        "| epochs | 150 |",
        "| validation | top-1 70.12 %, top-5 89.5 %, loss 1.25, after step 93,700 |",
        "| `optim.lr` | 0.00024 |",
        "| licence | *to be named by whoever shares these weights* |",
        "arXiv:2306.01129",
        "arXiv:2311.13110",
        "the short side resized to 18 pixels (bilinear), the central 16 x 16 cut out, less the mean (0.5, 0.4, 0.3)",
    ):
        assert line in card
    older = model_card("model-best.pt", SMALL, {**meta, "recipe_values": {"data.lanes": 8}})
    assert "| `order.lanes` | 8 |" in older
    stretched = model_card("model-best.pt", SMALL, {**meta, "eval_fit": "stretch"})
    assert "from 0 to 1: both sides resized to 16 pixels (bilinear), less the mean" in stretched
    assert meta["code"]["commit"] is None or meta["code"]["commit"] in card
    assert f"torch {meta['code']['packages']['torch']}" in card
    assert str(tmp_path) not in card  # where the data lay is nobody else's business


def test_what_is_not_known_is_left_out() -> None:
    card = model_card("theirs.pth.tar", SMALL, {"epoch": 3, "arch": "CRATE_tiny", "best_acc1": 12.5})
    assert "| epochs | 3 |" in card
    assert "| validation | top-1 12.5 %, the best of its run |" in card
    assert "None" not in card
    assert "Recipe" not in card
    assert "less the mean" not in card
    assert "| parameters |" in model_card("bare.pt", SMALL, {})


def test_the_loading_that_a_card_shows_works(
    tmp_path: Path, meta: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = initialise(SMALL, seed=0)
    export_model(tmp_path / "model-best.pt", SMALL, model.state_dict(), meta)
    convert(tmp_path / "model-best.pt", tmp_path / "theirs.pth.tar", "reference")
    (tmp_path / "photo.jpg").write_bytes(picture(1, (20, 16)))
    monkeypatch.chdir(tmp_path)
    for name in ("model-best.pt", "theirs.pth.tar"):
        code = re.search(r"```python\n(.+?)```", model_card(name, SMALL, meta), re.DOTALL)
        assert code
        names: dict[str, Any] = {}
        exec(code[1], names)
        assert torch.equal(names["logits"], model.eval()(names["images"]))


def test_the_card_stands_beside_and_keeps_the_licence_that_was_filled_in(tmp_path: Path, meta: dict[str, Any]) -> None:
    assert card_path(tmp_path / "model-best.pt") == tmp_path / "model-best.md"
    assert card_path(tmp_path / "a.b.pth.tar").name == "a.b.md"
    path = write_card(tmp_path / "model-best.pt", SMALL, meta)
    path.write_text(path.read_text().replace("*to be named by whoever shares these weights*", "CC BY 4.0"))
    write_card(tmp_path / "model-best.pt", SMALL, {**meta, "step": 2})
    assert "| licence | CC BY 4.0 |" in path.read_text()
    assert "| steps | 2 |" in path.read_text()


def test_a_conversion_writes_a_card_from_what_came_with_the_weights(tmp_path: Path, meta: dict[str, Any]) -> None:
    export_model(tmp_path / "model-best.pt", SMALL, initialise(SMALL, seed=0).state_dict(), meta)
    convert(tmp_path / "model-best.pt", tmp_path / "shared.safetensors", "safetensors")
    card = (tmp_path / "shared.md").read_text()
    assert card == model_card("shared.safetensors", SMALL, load_model(tmp_path / "shared.safetensors")[1])
    assert "12,345 samples" in card
    (tmp_path / "shared.md").write_text("my own words")
    convert(tmp_path / "model-best.pt", tmp_path / "shared.pt", "crate-dist")
    assert (tmp_path / "shared.md").read_text() == "my own words"


def test_a_meta_of_anybodys_making_neither_breaks_a_card_nor_adds_lines_to_it(tmp_path: Path) -> None:
    strange: dict[str, Any] = {
        "recipe": "x\n# Another title",
        "step": {"a": [1]},
        "epochs": "many",
        "metrics": {"val/top1": "high"},
        "data": {"train": 5, "val": {"samples": "1", "origin": "a | b"}},
        "code": ["commit"],
        "mean": "black",
        "recipe_values": [],
    }
    export_safetensors(tmp_path / "a.safetensors", SMALL, initialise(SMALL, seed=0).state_dict(), strange)
    convert(tmp_path / "a.safetensors", tmp_path / "b.pt", "crate-dist")
    card = (tmp_path / "b.md").read_text()
    assert card.startswith("# x # Another title\n")
    assert r"a \| b" in card


class Slower(ISTA):
    """A token-wise part that derives from a published one."""

    key = "slower"


class OfNobody(TokenWise):
    """A token-wise part that derives from none."""

    key = "of_nobody"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def forward(self, z: Tensor) -> Tensor:
        """(b, n, d) -> (b, n, d)"""
        return z


def test_the_card_of_a_composed_model_says_and_cites_whose_each_part_is(monkeypatch: pytest.MonkeyPatch) -> None:
    add_part(monkeypatch, TOKENWISE, "slower", Slower)
    add_part(monkeypatch, TOKENWISE, "of_nobody", OfNobody)
    cited = {"CRATE": "2306.01129", "CRATE-α": "2405.20299", "ToST": "2412.17810", "CBT": "2509.16875"}
    cited |= {"ViT": "2010.11929"}
    small = replace(SMALL, depth=1)
    cases: tuple[tuple[dict[str, Any], str, set[str]], ...] = (
        ({"mixer": "attention", "tokenwise": "mlp"}, "mixer attention of [ViT]", {"CRATE", "ViT"}),
        (
            {"mixer": "cbsa", "tokenwise": "odl", "stem": "convolutions", "residual": "pre_norm"},
            "mixer cbsa of [CBT](https://arxiv.org/abs/2509.16875), tokenwise odl of [CRATE-α]",
            {"CBT", "CRATE-α", "ToST", "ViT"},
        ),
        ({"mixer": "cbsa_aligned"}, "mixer cbsa_aligned after [CBT]", {"CRATE", "CBT", "ViT"}),
        ({"tokenwise": "slower"}, "tokenwise slower after [CRATE]", {"CRATE", "ViT"}),
        ({"tokenwise": "of_nobody"}, "tokenwise of_nobody, residual crate of [CRATE]", {"CRATE", "ViT"}),
    )
    for parts, said, whose in cases:
        card = model_card("a.pt", replace(small, **parts), {})
        assert card.startswith("# Image classifier\n\nAn image classifier for 7 classes, ")
        assert f"nobody's together: stem {parts.get('stem', 'patches')} of [" in card
        assert said in card
        citations = card.partition("## Citation")[2]
        assert {name for name, paper in cited.items() if f"arXiv:{paper}" in citations} == whose
    cbt = replace(small, mixer="cbsa", stem="convolutions")
    assert "A [CBT](https://arxiv.org/abs/2509.16875) image classifier" in model_card("a.pt", cbt, {})
