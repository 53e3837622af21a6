"""A file of weights that somebody made to do harm is refused in a sentence, in little memory."""

from __future__ import annotations

import math
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch

from crate_dist.config import ModelSection
from crate_dist.models.build import initialise, model_config
from crate_dist.models.weights.names import WeightsError, to_reference
from crate_dist.models.weights.read import load_model, read_weights
from crate_dist.models.weights.write import export_reference
from tests.models.test_alpha_jax import npy
from tests.models.test_odd_weights import SMALL

MIB = 2**20


def write_bomb(path: Path, record: str, method: int) -> None:
    """Writes a zip with 32 MiB in one record, which its directory says to be 1 MiB."""
    start = npy((MIB // 4,), bytes(MIB))
    with zipfile.ZipFile(path, "w", method) as archive, archive.open(record, "w") as file:
        for part in (start, bytes(31 * MIB)):
            file.write(part)
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"PK\x01\x02") + 24
    raw[at : at + 4] = len(start).to_bytes(4, "little")
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("record", "method", "said"),
    [
        ("x.npy", zipfile.ZIP_BZIP2, "x is compressed as NumPy compresses nothing"),
        ("x.npy", zipfile.ZIP_DEFLATED, "truncated or damaged: Bad CRC-32"),
        ("archive/data.pkl", zipfile.ZIP_BZIP2, "archive/data.pkl in it is compressed"),
        ("archive/data.pkl", zipfile.ZIP_DEFLATED, "archive/data.pkl in it is compressed"),
        ("archive/data.pkl", zipfile.ZIP_STORED, "of another size than it says"),
    ],
)
def test_no_more_is_inflated_than_a_file_says(tmp_path: Path, record: str, method: int, said: str) -> None:
    write_bomb(tmp_path / "bomb", record, method)
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match=said):
            read_weights(tmp_path / "bomb")
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()


def test_two_copies_of_a_weight_are_named_and_neither_is_taken(tmp_path: Path) -> None:
    state = dict(initialise(SMALL, seed=0).state_dict())
    published, path = to_reference(state), tmp_path / "both.pt"
    named = "pos_embedding' and '{}pos_embedding' are the same weight"
    for other in (to_reference(state, "_orig_mod."), to_reference(state, "module.")):
        torch.save({"state_dict": published | other}, path)
        with pytest.raises(WeightsError, match="both.pt: '" + named.format("(_orig_mod|module).")):
            read_weights(path)
    torch.save(published | {"head.linear.weight": state["head.linear.weight"]}, path)
    with pytest.raises(WeightsError, match=r"'mlp_head\.1\.weight' and 'head\.linear\.weight' are the same weight"):
        read_weights(path)


def test_a_zip_of_a_version_that_nobody_reads_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({}, path)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"PK\x01\x02") + 6] = 99
    path.write_bytes(raw)
    with pytest.raises(WeightsError, match=r"model\.pt is no PyTorch checkpoint, or a damaged one"):
        read_weights(path)


def test_numbers_beside_the_weights_that_no_model_has_are_not_taken(tmp_path: Path) -> None:
    section = ModelSection(arch="tost_tiny_12", width=16, depth=1, heads=2, image_size=32, patch_size=8)
    config, path = model_config(section, num_classes=3), tmp_path / "tost.pth"
    export_reference(path, config, initialise(config, seed=0).state_dict())
    whole = torch.load(path, weights_only=True)
    for field, value in (("layer_scale", math.inf), ("norm_eps", math.nan), ("norm_eps", -1.0), ("ista_step", 0)):
        torch.save(whole | {field: value}, path)
        model, _ = load_model(path)
        assert getattr(model.config, field) == getattr(config, field)
    torch.save(whole | {"ista_threshold": 0.0}, path)  # with which nothing is set to zero
    assert load_model(path)[0].config.ista_threshold == 0
    torch.save(whole | {"image_size": 33}, path)
    with pytest.raises(WeightsError, match=r"tost\.pth: beside its weights stands .*image_size = 33.*, which fits no"):
        load_model(path)
