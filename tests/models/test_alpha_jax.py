"""CRATE-α's JAX checkpoints are read as what they are, and a .npz of anybody's making runs and breaks nothing."""

from __future__ import annotations

import io
import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import crate_dist
from crate_dist.checkpoint.trained import load_trained
from crate_dist.models.weights.__main__ import main
from crate_dist.models.weights.families.alpha_jax import from_jax
from crate_dist.models.weights.files import describe
from crate_dist.models.weights.names import WeightsError
from crate_dist.models.weights.read import read_weights

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINT = GOLDEN / "crate_alpha_jax.npz"


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    """What the training code computed of the parameters in CHECKPOINT, which it wrote."""
    values: dict[str, Any] = torch.load(GOLDEN / "crate_alpha_jax_parity.pt", weights_only=True)
    return values


@pytest.fixture
def arrays() -> dict[str, Any]:
    """The parameters in CHECKPOINT, by name."""
    with np.load(CHECKPOINT) as file:
        return {name.removeprefix("params/"): file[name] for name in file.files if name.startswith("params/")}


def test_a_jax_checkpoint_computes_what_the_training_code_computes(golden: dict[str, Any]) -> None:
    model = load_trained(CHECKPOINT).model.eval()
    seen = model.forward_intermediates(golden["images"])
    assert (seen.logits - golden["logits"]).abs().max() < 1e-5 * golden["logits"].abs().max()
    for here, there in zip(seen.features, golden["features"], strict=True):
        assert (here - there).abs().max() < 1e-5
    loss = F.cross_entropy(seen.logits, golden["labels"], label_smoothing=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"], abs=1e-5)
    expected, _ = from_jax(golden["grads"])
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


def test_parameters_alone_compressed_and_in_bfloat16_are_read_too(tmp_path: Path, arrays: dict[str, Any]) -> None:
    whole = read_weights(CHECKPOINT).state_dict
    np.savez_compressed(tmp_path / "alone.npz", **arrays)
    alone = read_weights(tmp_path / "alone.npz")
    assert alone.kind == "jax"
    assert all(torch.equal(tensor, whole[name]) for name, tensor in alone.state_dict.items())
    halves = {name: torch.from_numpy(array).bfloat16().view(torch.int16).numpy() for name, array in arrays.items()}
    typeless: dict[str, Any] = {name: array.view("V2") for name, array in halves.items()}
    np.savez(tmp_path / "halves.npz", **typeless)
    half = read_weights(tmp_path / "halves.npz").state_dict
    assert all(torch.equal(tensor, whole[name].bfloat16()) for name, tensor in half.items())
    with zipfile.ZipFile(tmp_path / "halves.npz", "a") as archive:
        archive.writestr("README.txt", "of nobody's concern")
    assert "heads" in describe(tmp_path / "halves.npz")


def test_it_is_converted_to_every_format(
    golden: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.WARNING)
    for to, name in (("crate-dist", "model.pt"), ("safetensors", "model.safetensors"), ("reference", "alpha.pth")):
        main(["convert", str(CHECKPOINT), str(tmp_path / name), "--to", to, *["--heads", "3"] * (to == "reference")])
        logits = crate_dist.load(tmp_path / name, heads=3)(golden["images"])
        # the PyTorch code has another ε in the head's norm
        assert (logits - golden["logits"]).abs().max() < (1e-3 if to == "reference" else 1e-5)
    assert "its head_norm_eps is 1e-05, this model's 1e-06" in caplog.text
    assert "jax" not in capsys.readouterr().err


def npy(shape: tuple[int, ...], values: bytes) -> bytes:
    """Returns a .npy file that says `shape` of float32, whatever follows."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue() + values


def test_a_damaged_or_hostile_npz_is_refused_and_runs_nothing(tmp_path: Path, arrays: dict[str, Any]) -> None:
    path, ran = tmp_path / "hostile.npz", tmp_path / "ran"

    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return ran.touch, ()

    def refused(message: str) -> None:
        with pytest.raises(WeightsError, match=message):
            read_weights(path)

    np.savez(path, **arrays | {"cls": np.array([Runs()], dtype=object)})
    refused("hostile.npz: cls holds Python objects, which are not opened")
    assert not ran.exists()
    np.savez_compressed(path, **arrays | {"cls": np.zeros(2**23, np.float32)})
    refused("claims 33,5.* bytes of arrays, which a file of its size does not hold")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cls.npy", npy((10**9, 4), bytes(16)))
    refused(r"cls is damaged: shape \(1000000000, 4\) asks for 16,000,000,000 bytes, and 16 follow")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cls.npy", npy((1,), bytes(4)))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("cls.npy", npy((1,), bytes([1] * 4)))
    refused("hostile.npz has two arrays of one name")
    np.savez(path, **arrays | {"cls": np.zeros((1, 1, 12), int)})
    refused("cls has values of type int64, no weights")
    scale = arrays["Transformer/encoderblock_0/LayerNorm_0/scale"]
    for ours, array in (("cls_token", arrays["cls"]), ("layers.0.mssa_norm.weight", scale)):
        np.savez(path, **arrays | {ours: array})
        refused(f"hostile.npz: {ours} and another array are the same weight, {ours}; leave one")
    np.savez(path, **arrays | {"head/kernel": np.zeros(84, np.float32)})
    refused(r"head/kernel has shape \(84,\), expected the axes d k")
    np.savez(path, **arrays | {"head/scale": np.zeros(7, np.float32)})
    with pytest.raises(WeightsError, match="unexpected 'head/scale'"):
        read_weights(path).architecture()
    whole = CHECKPOINT.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused("truncated or damaged")
    at = whole.index(arrays["Transformer/encoderblock_0/OvercompleteISTABlock_0/D"].tobytes())
    path.write_bytes(whole[: at + 9] + bytes([whole[at + 9] ^ 1]) + whole[at + 10 :])
    refused("truncated or damaged: Bad CRC-32")


def test_an_npz_of_others_is_named_for_what_it_is(tmp_path: Path, arrays: dict[str, Any]) -> None:
    path = tmp_path / "other.npz"
    np.savez(path, labels=np.arange(3), logits=np.zeros((3, 2)))
    with pytest.raises(WeightsError, match=r"2 arrays, labels \(3,\), logits \(3, 2\); of .npz, those with the param"):
        read_weights(path)
    towers: dict[str, Any] = {f"params/img/{name}": array for name, array in arrays.items()}
    np.savez(path, **towers | {"params/txt/head/kernel": np.zeros((4, 4))})
    with pytest.raises(WeightsError, match=r"img/.*those with the parameters of CRATE-α's classifiers are read"):
        read_weights(path)
