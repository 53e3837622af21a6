"""The white box while it trains: seen in TensorBoard, without a trace in the weights."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data

from crate_dist.config import ModelSection, load_recipe
from crate_dist.data.decode import Pixels
from crate_dist.data.index import ShardIndex
from crate_dist.data.loader import eval_loader, eval_transform
from crate_dist.models.build import build_model
from crate_dist.models.costs import step_flops
from crate_dist.models.transformer import Transformer
from crate_dist.run.dashboard import address
from crate_dist.run.folder import RunFolder
from crate_dist.training.live import Live, first_images
from crate_dist.training.optim import Schedule
from crate_dist.world import World
from tests.conftest import SMALL_RECIPE, write_split
from tests.ranks import train_to_the_end

MEASURES = {
    "coding_rate",
    "coding_rate_change",
    "zeros",
    "dead_tokens",
    "dead_features",
    "coherence",
    "token_coding_rate",
    "subspace_coherence",
    "orthonormality_error",
    "out_alignment",
    "gradient_norm",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cast_shards: Path) -> dict[str, Path]:
    """Eight steps on two ranks: without measures, with them, and with them when all after the fourth is done again."""
    folder = tmp_path_factory.mktemp("live")
    recipe = folder / "small.toml"
    recipe.write_text(SMALL_RECIPE.replace("every_steps = 5", "every_steps = 4"))
    arguments: list[object] = ["--config", recipe, "--data", cast_shards, "--set", "model.dropout=0.1"]
    arguments += ["--set", "optim.lr=3e-5"]  # that it still takes some for others at the end
    measured = [*arguments, "--set", "log.whitebox_every_steps=3", "--set", "log.whitebox_images=5"]
    steps = ("--set", "train.max_steps=8")
    train_to_the_end([*arguments, *steps, "--set", "log.whitebox_every_steps=0", "--run-dir", folder / "off"], 2)
    traced = ("--set", "log.profile_steps=[3,4]")
    train_to_the_end([*measured, *steps, *traced, "--run-dir", folder / "on"], 2)
    shutil.copytree(folder / "on", folder / "killed")
    shutil.rmtree(RunFolder(folder / "killed").checkpoints / "step-00000008")
    train_to_the_end([*measured, *steps, "--run-dir", folder / "killed"], 2)
    return {name: folder / name for name in ("off", "on", "killed")}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(RunFolder(run).model("last"), weights_only=True)["state_dict"]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in RunFolder(run).metrics.read_text().splitlines()]


def events(run: Path) -> EventAccumulator:
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    found = EventAccumulator(str(RunFolder(run).tensorboard), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    found.Reload()
    return found


@pytest.mark.spawn
def test_a_run_that_is_measured_ends_with_the_same_weights(runs: dict[str, Path]) -> None:
    off, on = weights(runs["off"]), weights(runs["on"])
    assert off.keys() == on.keys()
    assert all(torch.equal(off[name], on[name]) for name in off)
    killed = weights(runs["killed"])
    assert all(torch.equal(killed[name], on[name]) for name in on)  # dropout, too, is drawn again as it was
    losses = [[line["train/loss"] for line in lines(runs[name]) if "train/loss" in line] for name in ("off", "on")]
    assert losses[0] == losses[1]
    assert not any("whitebox/coding_rate" in line for line in lines(runs["off"]))


@pytest.mark.spawn
@pytest.mark.parametrize("name", ["on", "killed"])
def test_every_layer_has_its_curves_at_the_same_steps_however_often_it_was_resumed(
    runs: dict[str, Path], name: str
) -> None:
    found = events(runs[name])
    tags = {f"9 layer by layer/{measure}/layer-{layer:02d}" for measure in MEASURES for layer in range(1, 5)}
    assert {tag for tag in found.Tags()["scalars"] if "layer-" in tag} == tags
    for tag in tags:
        assert [event.step for event in found.Scalars(tag)] == [1, 3, 6]
    stored = [line for line in lines(runs[name]) if "whitebox/zeros" in line]
    assert [line["step"] for line in stored] == [1, 3, 6]
    for line in stored:
        assert {key.removeprefix("whitebox/") for key in line if key.startswith("whitebox/")} == MEASURES
        assert all(0.2 < share < 0.9 for share in line["whitebox/zeros"])
        assert all(0 < norm < 100 for norm in line["whitebox/gradient_norm"])
    shown = [event.value for event in found.Scalars("9 layer by layer/coding_rate/layer-02")]
    assert shown == pytest.approx([line["whitebox/coding_rate"][1] for line in stored], rel=1e-6)


@pytest.mark.spawn
def test_a_resumed_run_measures_what_it_would_have_measured(runs: dict[str, Path]) -> None:
    measured = [
        {key: value for key, value in line.items() if key != "time"}
        for name in ("on", "killed")
        for line in lines(runs[name])
        if "whitebox/zeros" in line
    ]
    assert measured[:3] == measured[3:]


@pytest.mark.spawn
def test_pictures_and_charts_are_where_a_person_finds_them(runs: dict[str, Path]) -> None:
    found = events(runs["on"])
    steps = {tag: [picture.step for picture in found.Images(tag)] for tag in found.Tags()["images"]}
    assert steps == {
        "2 training/images/training": [1],
        "2 training/images/mistakes": [8],
        "6 white box/profile": [1, 3, 6],
        **{f"6 white box/over_time/{measure}": [1, 3, 6] for measure in MEASURES},
        "6 white box/attention_of_the_layers": [1, 3, 6],
        "6 white box/attention_of_the_last_layers_heads": [1, 3, 6],
    }
    layout = layout_pb2.Layout()
    layout.ParseFromString(found.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    pairs, layers = layout.category
    assert pairs.chart[0].multiline.tag[0] == "1 overview/Loss, train|1 overview/Loss, val"
    assert layers.title == "white box, layer by layer"
    assert len(layers.chart) == len(MEASURES)
    assert layers.chart[0].multiline.tag[0] == r"9 layer by layer/coding_rate/layer-\d+"


@pytest.mark.spawn
def test_the_overview_comes_first_and_nothing_stands_outside_the_groups(runs: dict[str, Path]) -> None:
    """Loss and top-1 lead it; the cards that the address pins are among it."""
    found = events(runs["killed"])
    tags = sorted(found.Tags()["scalars"] + found.Tags()["images"])
    assert [tag for tag in tags if tag[1] != " " or not tag[0].isdigit()] == []
    first = [f"1 overview/{name}" for name in ("Loss, train", "Loss, val", "Top-1, train", "Top-1, val")]
    assert tags[:4] == first
    assert all(0 <= event.value <= 100 for event in found.Scalars(first[2]))
    query = parse_qs(urlsplit(address(RunFolder(runs["killed"]))).query)
    assert query["smoothing"] == ["0"]
    pinned = [card["tag"] for card in json.loads(query["pinnedCards"][0])]
    assert set(pinned) < set(tags)
    shown = [(event.step, event.value) for event in found.Scalars("1 overview/restarts")]
    assert (5, 1.0) in shown


@pytest.mark.spawn
def test_the_texts_are_the_recipe_the_environment_and_every_start(runs: dict[str, Path]) -> None:
    found, folder = events(runs["killed"]), RunFolder(runs["killed"])
    texts = {
        name: found.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0].decode()
        for name in ("recipe", "environment", "starts")
    }
    assert f"| `optim.lr` | `{load_recipe(folder.recipe_file).optim.lr}` |" in texts["recipe"]
    assert f"| torch | `{torch.__version__}` |" in texts["environment"]
    rows = [line.split(" | ") for line in texts["starts"].splitlines()[2:]]
    starts = folder.record.starts()
    assert [row[1:3] for row in rows] == [[str(start["step"]), start["time"]] for start in starts]
    assert rows[1][-1] == "told to stop |"


@pytest.mark.spawn
def test_settings_stand_where_tensorboard_compares_runs(runs: dict[str, Path]) -> None:
    info = parse_session_start_info_plugin_data(
        events(runs["on"]).SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    )
    assert info.hparams["model.dropout"].number_value == 0.1
    assert info.group_name == f"{runs['on'].parent.name}/on"


@pytest.mark.spawn
def test_the_ledger_knows_what_it_cost(runs: dict[str, Path]) -> None:
    noted = [json.loads(line) for line in RunFolder(runs["on"]).ledger.read_text().splitlines()]
    costs = [line for line in noted if line["event"] == "whitebox"]
    assert [line["step"] for line in costs] == [1, 3, 6]
    assert all(line["seconds"] > 0 for line in costs)
    assert "white-box measures" in RunFolder(runs["on"]).log_file(0).read_text()


@pytest.mark.spawn
def test_every_line_tells_what_the_devices_do_and_hold(runs: dict[str, Path]) -> None:
    model = build_model(load_recipe(runs["on"] / "recipe.toml").model, 4, seed=0)
    work = step_flops(model.config, 6) / 6
    for line in (line for line in lines(runs["on"]) if "train/loss" in line):
        assert line["speed/tflop_s_per_rank"] == pytest.approx(line["speed/images_per_s"] * work / 2 / 1e12)
        assert 0.1 < line["memory/host_peak_gb"] < 10
        assert "speed/mfu" not in line  # of a CPU there is no peak to take a share of
    assert "peak memory 0." in RunFolder(runs["on"]).log_file(0).read_text()


@pytest.mark.spawn
def test_each_rank_leaves_a_trace_of_the_steps_that_were_asked_for(runs: dict[str, Path]) -> None:
    names = [f"rank-{rank:05d}.steps-3-4.pt.trace.json.gz" for rank in range(2)]
    assert sorted(path.name for path in RunFolder(runs["on"]).profile.iterdir()) == names
    assert not RunFolder(runs["off"]).profile.exists()
    for rank, name in enumerate(names):
        trace = json.loads(gzip.decompress((RunFolder(runs["on"]).profile / name).read_bytes()))
        assert trace["distributedInfo"]["rank"] == rank
        marks = Counter(event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation")
        micro_batches = 2 * 2  # steps, of a global batch of 24 in pieces of 6 on two ranks
        assert [marks[part] for part in ("data", "forward", "backward", "optimizer")] == 4 * [micro_batches]
        assert {mark for mark in marks if mark.startswith("ProfilerStep")} == {"ProfilerStep#3", "ProfilerStep#4"}


class Notes:
    """Takes what Live would write."""

    def __init__(self) -> None:
        self.layers: list[dict[str, list[float]]] = []
        self.pictures = set[str]()

    def white_box(self, step: int, layers: dict[str, list[float]], pictures: dict[str, Pixels], _: float) -> None:
        self.layers.append(layers)
        self.pictures |= pictures.keys()


class Untold:
    """An Interrupt that never comes."""

    def go_on(self) -> None: ...

    def hold(self) -> None: ...


def live(cast_shards: Path, small_recipe: Path, model: Transformer, steps: list[int]) -> Notes:
    """Measures of a model at these steps, on one rank; an epoch has 8.3 steps, the first of which is the warm-up."""
    recipe = load_recipe(small_recipe, data__root=str(cast_shards), log__whitebox_every_steps=10)
    world, index = World(0, 1, 0, 1, "127.0.0.1", 0, "test"), ShardIndex.load(cast_shards / "val")
    one, notes = Live(recipe, world, torch.device("cpu"), index, Schedule(3, 200, 24)), Notes()
    with pytest.MonkeyPatch.context() as alone:
        alone.setattr("crate_dist.training.live.gather_objects", lambda value: [value])
        for step in steps:
            assert one.is_due(step)
            one.measure(model, step, notes, Untold())  # type: ignore[arg-type]
    return notes


@pytest.mark.parametrize("arch", ["crate_alpha_base", "tost_tiny_12", "cbt_tiny", "vit_tiny"])
def test_every_model_of_the_family_shows_what_it_has_and_says_the_rest(
    arch: str, cast_shards: Path, small_recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    section = ModelSection(arch=arch, image_size=32, patch_size=8, width=48, depth=2, heads=3)
    model = build_model(section, 4, seed=0)
    with caplog.at_level(logging.INFO):
        notes = live(cast_shards, small_recipe, model, [1, 10])
    measured = {name.removeprefix("whitebox/") for name in notes.layers[0]}
    assert all(len(values) == 2 for values in notes.layers[1].values())
    has_subspaces, has_code = arch != "vit_tiny", arch in ("crate_alpha_base", "cbt_tiny")
    assert measured >= {"token_coding_rate", "gradient_norm"}
    assert ("coding_rate" in measured) == ("out_alignment" in measured) == has_subspaces
    assert ("zeros" in measured) == ("coherence" in measured) == has_code
    assert ("decoder_alignment" in measured) == (arch == "crate_alpha_base")
    assert ("membership_entropy" in measured) == (arch == "tost_tiny_12")
    assert ("representatives_rate" in measured) == (arch == "cbt_tiny")
    said = [record.getMessage() for record in caplog.records if "the white box of this model" in record.getMessage()]
    assert len(said) == (not has_subspaces) + (not has_code), "once, though it was measured twice"
    kind = "membership" if arch == "tost_tiny_12" else "attention"
    expected = {"profile", f"{kind}_of_the_layers", f"{kind}_of_the_last_layers_heads"}
    assert notes.pictures == {
        f"whitebox/{name}" for name in expected | ({"attention_of_the_head"} if kind[0] == "m" else set())
    }


def test_layers_that_stop_compressing_are_named_once_and_not_before_the_warm_up(
    cast_shards: Path, small_recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model(load_recipe(small_recipe).model, 4, seed=0)
    of = dict(model.named_parameters())
    with torch.no_grad():
        for layer in (f"layers.{number}.mssa" for number in range(4)):
            of[f"{layer}.out.weight"].copy_(0.2 * of[f"{layer}.subspaces.weight"].T)  # the derivation's: it compresses
            of[f"{layer}.out.bias"].zero_()
        of["layers.2.mssa.out.weight"].zero_()  # adds nothing: the rate stays as it is
    with caplog.at_level(logging.WARNING):
        notes = live(cast_shards, small_recipe, model, [1])
        assert "compresses" not in caplog.text
        live(cast_shards, small_recipe, model, [10, 20])
    change = notes.layers[0]["whitebox/coding_rate_change"]
    assert change[2] == 0
    assert max(change[:2]) < 0
    warned = [record.getMessage() for record in caplog.records if "compresses no longer" in record.getMessage()]
    assert len(warned) == 1
    assert warned[0].startswith("layer 3 compresses no longer: at step 10")


def test_tokens_that_die_are_reported_with_their_layer(
    cast_shards: Path, small_recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model(load_recipe(small_recipe).model, 4, seed=0)
    with torch.no_grad():
        dict(model.named_parameters())["layers.3.ista_norm.weight"].zero_()
    with caplog.at_level(logging.WARNING):
        live(cast_shards, small_recipe, model, [1, 10])
    warned = [record.getMessage() for record in caplog.records if "all zero" in record.getMessage()]
    assert len(warned) == 1
    assert warned[0].startswith("100 % of the tokens are all zero after layer 4 at step 1")


def test_measures_that_take_too_much_time_say_how_many_would_not(
    cast_shards: Path, small_recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = load_recipe(small_recipe, log__whitebox_every_steps=200)
    world, index = World(0, 1, 0, 1, "127.0.0.1", 0, "test"), ShardIndex.load(cast_shards / "val")
    one = Live(recipe, world, torch.device("cpu"), index, Schedule(3, 200, 24))
    for began, seconds in ((0, 50), (149, 1), (249, 1)):  # half a per cent beside the first
        one._say_when_costly(began, seconds)
    assert not caplog.records
    for began in (295, 395):
        one._say_when_costly(began, 5)
    assert [record.getMessage() for record in caplog.records] == [
        "the white-box measures take 2.8 % of the time; --set log.whitebox_every_steps=600 costs 1 % at most"
    ]


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 1e30])
def test_a_model_that_has_burst_is_measured_too(cast_shards: Path, small_recipe: Path, broken: float) -> None:
    model = build_model(load_recipe(small_recipe).model, 4, seed=0).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(broken)
    assert len(live(cast_shards, small_recipe, model, [1]).layers) == 1


def test_bad_images_are_passed_over_and_the_first_good_ones_are_taken(small_recipe: Path, tmp_path: Path) -> None:
    from tests.conftest import casts

    samples = [
        (key, image[:40] if number in (0, 3) else image, label)
        for number, (key, image, label) in enumerate(casts(12, seed=3))
    ]
    index = write_split(tmp_path / "val", iter(samples), shard_samples=5, classes=4)
    recipe = load_recipe(small_recipe, log__whitebox_images=4)
    pixels, labels = first_images(index, recipe)
    assert labels.tolist() == [1, 2, 0, 1]  # samples 1, 2, 4 and 5
    assert pixels.shape == (4, 32, 32, 3)
    assert np.array_equal(first_images(index, recipe)[0], pixels)


def test_the_images_are_those_of_evaluation_prepared_as_for_it(small_recipe: Path, cast_shards: Path) -> None:
    index = ShardIndex.load(cast_shards / "val")
    for fit in ("crop", "stretch"):
        recipe = load_recipe(small_recipe, images__eval_fit=fit, images__eval_crop=0.5)
        pixels, labels = first_images(index, recipe)
        transform = eval_transform(recipe.images, recipe.model.image_size)
        batch = next(iter(eval_loader(index, 0, 1, transform, len(pixels), workers=0)))
        assert torch.equal(torch.from_numpy(pixels), batch.images), fit
        assert torch.equal(labels, batch.labels)
