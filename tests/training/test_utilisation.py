"""MFU and peak memory: of the peaks that are published, by the names that drivers have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from crate_dist.config import load_recipe
from crate_dist.models.build import build_model
from crate_dist.training import utilisation
from crate_dist.training.utilisation import Utilisation, peak_memory_gb, published_flop_s


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_a_gpu_is_known_by_the_name_that_the_driver_has(name: str, tera: float) -> None:
    assert published_flop_s(name) == tera * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",  # a slice
        "NVIDIA A10G",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H20",
        "Tesla V100-SXM2-32GB",
        "cpu",
    ],
)
def test_of_another_device_no_peak_is_made_up(name: str) -> None:
    assert published_flop_s(name) is None


def on_gpus(monkeypatch: pytest.MonkeyPatch, recipe: Path, *names: str, precision: str = "bf16") -> dict[str, float]:
    """What 1,000 images/s of CRATE-B are on these GPUs."""
    loaded = load_recipe(recipe, model__arch="crate_base", model__image_size=224, model__patch_size=16)
    loaded = loaded.model_copy(update={"train": loaded.train.model_copy(update={"precision": precision})})
    config = build_model(loaded.model, 1000, seed=0).config
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[0])
    peaks = [published_flop_s(name) for name in names]
    monkeypatch.setattr(utilisation, "gather_objects", lambda mine: [mine, *peaks[1:]])
    return Utilisation(config, loaded, 128, torch.device("cuda", 0)).scalars(1000)


def test_mfu_is_the_share_of_all_peaks_together(monkeypatch: pytest.MonkeyPatch, small_recipe: Path) -> None:
    used = on_gpus(monkeypatch, small_recipe, "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB")
    # 15.6 GFLOP forward as published, less the products that ISTA saves
    assert 1000 * 3 * 10e9 / 2 < used["speed/tflop_s_per_rank"] * 1e12 < 1000 * 3 * 15.6e9 / 2
    assert used["speed/mfu"] == pytest.approx(2 * used["speed/tflop_s_per_rank"] / (989 + 312))


def test_mfu_is_left_out_where_a_peak_is_unknown_or_another_rate(
    monkeypatch: pytest.MonkeyPatch, small_recipe: Path
) -> None:
    h100 = "NVIDIA H100 80GB HBM3"
    assert on_gpus(monkeypatch, small_recipe, h100, "NVIDIA A10G").keys() == {"speed/tflop_s_per_rank"}
    assert on_gpus(monkeypatch, small_recipe, h100, precision="fp32").keys() == {"speed/tflop_s_per_rank"}


def test_the_memory_of_the_process_is_what_the_kernel_says() -> None:
    told = peak_memory_gb(torch.device("cpu"))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) * 1024 / 1e9
    assert told == {"memory/host_peak_gb": pytest.approx(peak, rel=0.05)}
