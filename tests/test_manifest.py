"""A manifest that no save wrote is refused in plain words, also where its digest is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crate_dist.checkpoint import CheckpointError, manifest_digest, open_checkpoint, rank_file
from tests.test_checksums import ANYTHING, paths_into


def manifest() -> dict[str, Any]:
    """As two ranks write it."""
    groups = [{"names": ["a", "b"], "shapes": [[3, 5], [4]]}, {"names": ["c"], "shapes": [[7]]}]
    return {
        "version": 1,
        "progress": {"step": 10, "evaluated_at": -1, "best_top1": -1.0, "best_step": -1, "metrics": {"loss": 1.5}},
        "world_size": 2,
        "groups": groups,
        "partitions": [10, 4],
        "recipe": {},
        "files": {rank_file(rank): {"bytes": 100, "sha256": "0" * 64} for rank in range(2)},
    }


def written(folder: Path, said: dict[str, Any]) -> Path:
    said = {key: value for key, value in said.items() if key != "digest"}
    (folder / "manifest.json").write_text(json.dumps({**said, "digest": manifest_digest(said)}))
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"world_size": 5e6}, "world_size is 5000000.0, expected a whole number"),
        ({"world_size": 10**12}, "does not list the files of 1000000000000 ranks"),
        ({"world_size": True}, "world_size is True"),
        ({"partitions": [0, 4]}, r"partitions\[0\] is 0, and 2 of them are to hold 19 elements"),
        ({"partitions": [10**30, 4]}, r"partitions\[0\] is 1"),
        ({"partitions": [10, 3]}, r"partitions\[1\] is 3, and 2 of them are to hold 7 elements"),
        ({"partitions": [0]}, "groups and partitions are no lists of one length"),
        ({"files": {"../rank-00000.pt": {}, "rank-00001.pt": {}}}, "does not list the files of 2 ranks"),
        ({"groups": [{"names": ["a"], "shapes": [[10**30]]}, {"names": ["b"], "shapes": [[7]]}]}, "a shape"),
        ({"progress": {"step": -3}}, "progress has a step that is none"),
        ({"progress": {"step": 3, "metrics": {"loss": "low"}}}, "metrics that are no numbers"),
    ],
)
def test_a_value_that_cannot_be_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    assert open_checkpoint(written(tmp_path, manifest())).step == 10
    with pytest.raises(CheckpointError, match=f"manifest.json cannot be right: .*{said}"):
        open_checkpoint(written(tmp_path, {**manifest(), **change}))


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
    assert len(checkpoint.layouts) == len(checkpoint.manifest["partitions"])
    assert "No such file" in str(checkpoint.damaged())
    assert all(torch.Size(shape).numel() >= 0 for layout in checkpoint.layouts for shape in layout.shapes)
