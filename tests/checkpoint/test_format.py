"""A manifest that no save wrote is refused in plain words, also where its digest is right."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crate_dist.checkpoint.format import (
    CheckpointError,
    GroupLayout,
    Manifest,
    Progress,
    StoredFile,
    manifest_digest,
    newest_manifest,
    rank_file,
    read_manifest,
    write_manifest,
)
from crate_dist.checkpoint.loading import open_checkpoint
from crate_dist.checkpoint.trained import load_trained
from crate_dist.config import load_recipe
from crate_dist.models.build import build_model
from crate_dist.run.folder import RunFolder
from tests.data.test_checksums import ANYTHING, paths_into

FILE = {"bytes": 100, "sha256": "0" * 64}


def manifest() -> dict[str, Any]:
    """As two ranks write it."""
    groups = [{"names": ["a", "b"], "shapes": [[3, 5], [4]]}, {"names": ["c"], "shapes": [[7]]}]
    return {
        "version": 1,
        "progress": {"step": 10, "evaluated_at": -1, "best_top1": -1.0, "best_step": -1, "metrics": {"loss": 1.5}},
        "world_size": 2,
        "groups": groups,
        "partitions": [10, 4],
        "kinds": ["exp_avg", "fp32"],
        "recipe": {},
        "files": {rank_file(rank): dict(FILE) for rank in range(2)},
    }


def written(folder: Path, said: dict[str, Any]) -> Path:
    said = {key: value for key, value in said.items() if key != "digest"}
    (folder / "manifest.json").write_text(json.dumps({**said, "digest": manifest_digest(said)}))
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"world_size": 5e6}, "world_size is 5000000.0: Input should be a valid integer"),
        ({"world_size": 10**12}, "does not list the files of 1000000000000 ranks"),
        ({"world_size": True}, "world_size is True"),
        ({"partitions": [0, 4]}, r"partitions.0 is 0, and 2 of them are to hold 19 elements"),
        ({"partitions": [10**30, 4]}, r"partitions.0 is 1"),
        ({"partitions": [10, 3]}, r"partitions.1 is 3, and 2 of them are to hold 7 elements"),
        ({"partitions": [0]}, "groups and partitions are no lists of one length"),
        ({"files": {"../rank-00000.pt": FILE, "rank-00001.pt": FILE}}, "does not list the files of 2 ranks"),
        (
            {"groups": [{"names": ["a"], "shapes": [[10**30]]}, {"names": ["b"], "shapes": [[7]]}]},
            r"groups\.0\.shapes\.0\.0 is 1",
        ),
        (
            {"groups": [{"names": ["a"], "shapes": [[2**40]]}], "partitions": [2**39]},
            "more than files of 200 bytes hold",
        ),
        ({"groups": [{"names": ["a", "a"], "shapes": [[3], [3]]}], "partitions": [4]}, "parameters have the same name"),
        ({"buffers": {"m": [2]}}, "does not list the files of 2 ranks, and buffers.pt"),
        (
            {"buffers": {"a": [2]}, "files": {**manifest()["files"], "buffers.pt": FILE}},
            "parameters have the same name",
        ),
        ({"kinds": ["exp_avg"]}, r"kinds are \['exp_avg'\], expected names with fp32"),
        ({"tenure": [1]}, r"tenure is \[1\]: Input should be a valid integer"),
        ({"data": {"train": [1, 2], "val": None}}, r"data\.train is \[1, 2\]: Input should be a valid dictionary"),
        ({"classes": [["a"], {}]}, r"classes\.0 is \['a'\]: Input should be an instance of str"),
        ({"progress": {"step": -3}}, r"progress\.step is -3: Input should be greater than or equal to 0"),
        (
            {"progress": {"step": 3, "metrics": {"loss": "low"}}},
            r"progress\.metrics\.loss is 'low': Input should be a valid number",
        ),
    ],
)
def test_a_value_that_cannot_be_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    assert open_checkpoint(written(tmp_path, manifest())).step == 10
    with pytest.raises(CheckpointError, match=f"manifest.json cannot be right: .*{said}"):
        open_checkpoint(written(tmp_path, {**manifest(), **change}))


def test_a_manifest_reads_back_as_it_was_written(tmp_path: Path) -> None:
    whole = Manifest(
        world_size=1,
        tenure=3,
        progress=Progress(step=7, metrics={"val/loss": float("inf")}),
        groups=[GroupLayout(["a"], [[5]])],
        partitions=[6],
        kinds=["average", "fp32"],
        files={rank_file(0): StoredFile(48, "0" * 64)},
        recipe={"optim.betas": None},
        classes=["a folder's name that is no Unicode: \udcff"],
        data={"train": {"samples": 3}, "val": None},
    )
    write_manifest(tmp_path, whole)
    assert read_manifest(tmp_path) == whole
    assert json.loads((tmp_path / "manifest.json").read_text()).items() >= {"version": 1, "partitions": [6]}.items()
    with_buffers = replace(whole, buffers={"m": [2]}, files={**whole.files, "buffers.pt": StoredFile(9, "0" * 64)})
    write_manifest(tmp_path, with_buffers)
    assert read_manifest(tmp_path) == with_buffers
    said = json.loads((tmp_path / "manifest.json").read_text())
    assert said["version"] == 2, "a program that would lose the buffers is to refuse them"


def test_what_older_manifests_do_not_say_is_not_missed_and_what_a_later_version_says_is_not_guessed(
    tmp_path: Path,
) -> None:
    older = open_checkpoint(written(tmp_path, manifest())).manifest
    assert (older.tenure, older.classes, older.data) == (0, None, None)
    with pytest.raises(CheckpointError, match="has format 3, which this program does not know: it reads 1 to 2"):
        open_checkpoint(written(tmp_path, {**manifest(), "version": 3}))


def test_a_launcher_passes_over_what_a_run_passes_over(tmp_path: Path) -> None:
    folders = [tmp_path / f"step-0000000{number}" for number in range(5)]
    for folder in folders:
        folder.mkdir()
    written(folders[0], manifest())
    written(folders[1], {**manifest(), "data": {"train": [1, 2]}})
    written(folders[2], {key: value for key, value in manifest().items() if key != "progress"})
    (folders[3] / "manifest.json").write_text("[" * 200_000 + "]" * 200_000)
    for folder in folders[1:]:
        with pytest.raises(CheckpointError, match=str(folder)):
            open_checkpoint(folder)
    assert newest_manifest(tmp_path) == read_manifest(folders[0])


def test_a_checkpoint_of_another_model_than_its_recipe_s_is_refused(small_recipe: Path, tmp_path: Path) -> None:
    recipe = load_recipe(small_recipe)
    RunFolder(tmp_path / "run").open(recipe)
    folder = tmp_path / "run/checkpoints/step-00000010"
    folder.mkdir(parents=True)
    weights = build_model(recipe.model, 4, seed=1).state_dict()
    names, shapes = list(weights), [list(tensor.shape) for tensor in weights.values()]
    flat = torch.cat([tensor.flatten() for tensor in weights.values()])

    def saved(names: list[str], shapes: list[list[int]], state: object) -> Path:
        torch.save(state, folder / rank_file(0))
        data = (folder / rank_file(0)).read_bytes()
        files = {rank_file(0): {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
        groups = {"groups": [{"names": names, "shapes": shapes}], "partitions": [len(flat)]}
        return written(folder, {**manifest(), **groups, "world_size": 1, "files": files, "kinds": ["fp32"]})

    loaded = load_trained(saved(names, shapes, {"fp32": [flat]})).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    for changed, said in (
        ([name.replace("head.", "tail.") for name in names], "is not a CRATE's: head.linear.weight is no matrix in it"),
        (["x", *names[1:]], rf"does not fit the recipe of its run: .*missing '{names[0]}'"),
    ):
        with pytest.raises(CheckpointError, match=f"(?s)manifest.json .*{said}"):
            load_trained(saved(changed, shapes, {"fp32": [flat]}))
    for state in ({"fp32": [flat[:1]]}, {"fp32": flat}, {}, [flat], {"fp32": [1.0]}):
        with pytest.raises(CheckpointError, match="does not hold the partitions of fp32"):
            load_trained(saved(names, shapes, {**state, "padding": flat} if isinstance(state, dict) else [*state]))
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        load_trained(saved(names, shapes, {"fp32": [flat], "path": tmp_path}))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_value_anywhere_in_a_manifest_gives_a_checkpoint_or_a_clear_error(
    tmp_path: Path, data: st.DataObject
) -> None:
    said = manifest()
    *way, last = data.draw(st.sampled_from([path for path in paths_into(said) if path]))
    place: Any = said
    for key in way:
        place = place[key]
    place[last] = data.draw(ANYTHING)
    try:
        checkpoint = open_checkpoint(written(tmp_path, said))
    except CheckpointError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert str(tmp_path) in refused
        return
    assert checkpoint.progress.step == checkpoint.step >= 0
    assert len(checkpoint.manifest.groups) == len(checkpoint.manifest.partitions)
    assert "No such file" in str(checkpoint.damaged())
    assert all(torch.Size(shape).numel() >= 0 for layout in checkpoint.manifest.groups for shape in layout.shapes)
