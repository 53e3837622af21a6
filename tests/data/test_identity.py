"""A run goes on with the data that it was trained on, or says what is different about those that there are now."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from crate_dist.checkpoint.format import CheckpointError
from crate_dist.checkpoint.loading import Checkpoint, list_checkpoints
from crate_dist.checkpoint.resuming import progress_on
from crate_dist.config import RecipeError, load_recipe
from crate_dist.data.identity import DataIdentity
from crate_dist.data.index import ShardError, ShardIndex
from crate_dist.data.splits import open_split, open_splits
from crate_dist.launching.preflight import preflight
from crate_dist.models.weights.card import model_card
from crate_dist.models.weights.read import load_model
from crate_dist.run.exit_status import TRY_AGAIN
from crate_dist.run.folder import RunFolder
from crate_dist.world import World
from tests.conftest import SMALL_RECIPE, casts, write_split
from tests.data_prep import run
from tests.ranks import Training, train_to_the_end


def identity(root: Path) -> DataIdentity:
    return DataIdentity.of(ShardIndex.load(root / "train"), ShardIndex.load(root / "val"))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, cast_shards: Path) -> Path:
    """A folder with a recipe, small.toml, and a run of ten steps on cast_shards, which was evaluated at step 9."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "small.toml").write_text(SMALL_RECIPE)
    arguments = ["--config", folder / "small.toml", "--data", cast_shards, "--run-dir", folder / "run"]
    train_to_the_end([*arguments, "--set", "train.max_steps=10", "--set", "checkpoint.every_steps=9"], world_size=1)
    return folder


@pytest.fixture
def checkpoint(begun: Path) -> Checkpoint:
    return list_checkpoints(RunFolder(begun / "run").checkpoints)[-1]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[World]:
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield World(0, 1, 0, 1, "127.0.0.1", 0, "test")
    dist.destroy_process_group()


def test_what_was_moved_or_indexed_anew_is_the_same_data(
    cast_shards: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(cast_shards, moved)
    for split in ("train", "val"):
        (moved / split / "index.json").unlink()
    assert run("index.py", moved).returncode == 0
    texts = [(root / "train/index.json").read_bytes() for root in (cast_shards, moved)]
    assert texts[0] != texts[1]  # the second names its maker
    assert identity(moved) == identity(cast_shards)
    assert identity(moved).differences(checkpoint.manifest.data, checkpoint.manifest.classes) == {}


def test_an_index_with_more_columns_is_the_same_data(cast_shards: Path) -> None:
    index = ShardIndex.load(cast_shards / "train")
    wider = np.zeros(len(index.rows), [("label", "<i4"), ("checksum", "<u8"), ("offset", "<i8"), ("size", "<i4")])
    for name in ("offset", "size", "label"):
        wider[name] = index.rows[name]
    other = ShardIndex(index.root, index.shards, wider, index.classes, index.class_names)
    assert DataIdentity.of(other, None) == DataIdentity.of(index, None)


def changed(split: ShardIndex, **changes: object) -> None:
    ShardIndex(**{**vars(split), **changes}).save()


def reverse_classes(root: Path) -> None:
    for split in ("train", "val"):
        index = ShardIndex.load(root / split)
        changed(index, classes=index.classes[::-1])


def other_shards(root: Path) -> None:
    shutil.rmtree(root / "train")
    write_split(root / "train", casts(200, seed=7), shard_samples=60, classes=4)


def other_labels(root: Path) -> None:
    index = ShardIndex.load(root / "val")
    rows = np.array(index.rows)
    rows["label"] = 3 - rows["label"]
    changed(index, rows=rows)


def other_order(root: Path) -> None:
    index = ShardIndex.load(root / "train")
    split = np.cumsum(index.shard_sizes)[:-1]
    changed(index, shards=index.shards[::-1], rows=np.concatenate(np.split(np.array(index.rows), split)[::-1]))


def fewer_samples(root: Path) -> None:
    index = ShardIndex.load(root / "train")
    changed(index, shards=index.shards[:-1], rows=np.array(index.rows[:180]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (reverse_classes, ["classes: number 0 is '0' there and '3' now", "train: other classes", "val: other classes"]),
        (other_shards, ["train: other shards (4 there, 4 now); other offsets"]),
        (other_labels, ["val: other labels\n"]),
        (other_order, ["train: other shards"]),
        (fewer_samples, ["train: 200 samples there, 180 now"]),
    ],
)
def test_other_data_are_refused_with_what_differs_by_the_launcher_and_by_the_run(
    begun: Path,
    cast_shards: Path,
    checkpoint: Checkpoint,
    alone: World,
    tmp_path: Path,
    change: Callable[[Path], None],
    said: list[str],
) -> None:
    shutil.copytree(cast_shards, tmp_path / "data")
    change(tmp_path / "data")
    folder, recipe = RunFolder(begun / "run"), load_recipe(begun / "small.toml", data__root=str(tmp_path / "data"))
    with pytest.raises(CheckpointError) as refused:
        progress_on(identity(tmp_path / "data"), checkpoint, folder, alone, "the digest of other data")
    with pytest.raises(RecipeError) as at_once:
        preflight(recipe, 1, folder.path)
    for message in (str(refused.value), str(at_once.value)):
        assert "--accept-changed-data" in message
        assert all(words in message for words in said), message
        assert ("val:" in message) == any("val:" in words for words in said)
    accepted = preflight(recipe, 1, folder.path, accept_changed_data=True).accepted_data
    assert accepted == identity(tmp_path / "data").digest  # what a job in a queue is given
    assert folder.record.changed_data() == []


def test_a_checkpoint_from_before_this_is_accepted_with_a_line(
    begun: Path,
    cast_shards: Path,
    checkpoint: Checkpoint,
    alone: World,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    older = replace(checkpoint.manifest, data=None, classes=None)
    shutil.copytree(cast_shards, tmp_path / "data")
    other_shards(tmp_path / "data")
    caplog.set_level(logging.INFO)
    found = Checkpoint(checkpoint.path, older)
    assert progress_on(identity(tmp_path / "data"), found, RunFolder(begun / "run"), alone, False) == found.progress
    assert "from before checkpoints knew their data" in caplog.text
    reverse_classes(tmp_path / "data")  # the classes were known before
    found = Checkpoint(checkpoint.path, replace(checkpoint.manifest, data=None))
    with pytest.raises(CheckpointError, match="number 0 is '0' there and '3' now"):
        progress_on(identity(tmp_path / "data"), found, RunFolder(begun / "run"), alone, False)


@pytest.mark.spawn
def test_changed_data_that_are_accepted_count_from_there_on_and_are_put_down(
    begun: Path, cast_shards: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    assert checkpoint.progress.best_step == 9
    shutil.copytree(begun / "run", tmp_path / "run")
    shutil.copytree(cast_shards, tmp_path / "data")
    other_labels(tmp_path / "data")
    arguments = ["--config", begun / "small.toml", "--data", tmp_path / "data", "--run-dir", tmp_path / "run"]
    arguments += ["--set", "train.max_steps=12"]
    with Training(arguments, world_size=1) as refused:
        assert refused.wait() == [1]
        assert "val: other labels" in refused.output()
    output = train_to_the_end([*arguments, "--accept-changed-data"], world_size=1)
    assert "going on from step 10 with OTHER DATA" in output
    folder, data = RunFolder(tmp_path / "run"), identity(tmp_path / "data")
    (note,) = json.loads(folder.record_file.read_text())["changed_data"]
    assert note == {"step": 10, "digest": data.digest, "changes": {"val": "other labels"}}
    last = list_checkpoints(folder.checkpoints)[-1]
    assert last.progress.best_step == 12  # with the labels turned round, below that of step 9
    assert last.progress.best_top1 < checkpoint.progress.best_top1
    assert data.differences(last.manifest.data, last.manifest.classes) == {}
    model, meta = load_model(folder.model("last"))
    assert "| data changed after step 10 | val: other labels |" in model_card("model-last.pt", model.config, meta)
    assert folder.record.data_was_accepted(10, data.digest)
    assert not folder.record.data_was_accepted(12, data.digest)


@pytest.mark.spawn
def test_fewer_steps_than_were_taken_complete_the_run(begun: Path, cast_shards: Path, tmp_path: Path) -> None:
    shutil.copytree(begun / "run", tmp_path / "run")
    (tmp_path / "run/model-last.pt").unlink()
    arguments = ["--config", begun / "small.toml", "--data", cast_shards, "--run-dir", tmp_path / "run"]
    with Training([*arguments, "--set", "train.max_steps=4"], world_size=1) as over:
        assert over.wait() != [TRY_AGAIN]
        assert over.wait() == [0], over.output()
        assert "step 10 is behind the last one, 4: nothing to train" in over.output()
    assert load_model(tmp_path / "run/model-last.pt")[1]["step"] == 10


def test_rows_that_are_not_those_of_the_index_beside_them_are_refused(cast_shards: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(cast_shards, root)
    rows = np.load(root / "train/index.npy")
    rows["label"] = 3 - rows["label"]
    np.save(root / "train/index.npy", rows)
    recipe = load_recipe("demo", data__root=str(root), train__global_batch=8)
    with pytest.raises(ShardError, match=r"train/index.npy does not belong to the index.json beside it"):
        open_splits(recipe)
    meta = json.loads((root / "train/index.json").read_text())
    del meta["rows_sha256"]  # as in the first indexes
    (root / "train/index.json").write_text(json.dumps(meta))
    assert open_split(root, "train", recipe.data).num_samples == 200


def test_splits_of_different_classes_are_refused_with_the_first_that_differs(cast_shards: Path, tmp_path: Path) -> None:
    shutil.copytree(cast_shards, tmp_path / "data")
    index = ShardIndex.load(tmp_path / "data/val")
    changed(index, classes=["0", "1", "3", "2"])
    recipe = load_recipe("demo", data__root=str(tmp_path / "data"), train__global_batch=8)
    with pytest.raises(ShardError, match="same order: number 2 is '2' in the one and '3' in the other"):
        open_splits(recipe)
