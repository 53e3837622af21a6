"""Fixtures that several test files share; what hides the GPUs of this machine from all tests but those of them."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from crate_dist.data.index import ROW, Shard, ShardIndex
from crate_dist.prep.tar import scan_shard

if TYPE_CHECKING:
    from tests.chaos.trial import Trial


def pytest_configure(config: pytest.Config) -> None:
    """Hides the GPUs before torch looks for them: the tests promise what ranks do on the CPU, on any machine.

    And this user's site files, which would have jobs ask for other things. A Ctrl-C is heeded, as in a terminal.
    One thread for each process: those of two tests at the same time would wait for each other, computing. So has the
    compiler, which is told that the C++ compiler knows this processor: to find out it would start programs each time.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # of a job in the background, and so of all that it starts
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["CRATE_SITE"] = ""
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS", "TORCHINDUCTOR_VEC_ISA_OK"):
        os.environ.setdefault(name, "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what needs a GPU where none is shown."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU to be seen: on a machine with one, pytest -m gpu")


@pytest.fixture(autouse=True)
def environment_as_before() -> Iterator[None]:
    """Takes back what a test, or a program that it called in this process, has told those after it by variables."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def write_split(
    folder: Path, samples: Iterator[tuple[str, bytes, int]], shard_samples: int, classes: int
) -> ShardIndex:
    """Writes (key, image bytes, label) as plain WebDataset tars with an index."""
    folder.mkdir(parents=True)
    shards: list[Shard] = []
    rows = []
    pending = list(samples)
    for first in range(0, len(pending), shard_samples):
        path = folder / f"{folder.name}-{len(shards):06d}.tar"
        with webdataset.TarWriter(str(path), encoder=False) as tar:
            for key, image, label in pending[first : first + shard_samples]:
                tar.write({"__key__": key, "png": image, "cls": str(label).encode()})
        scanned = scan_shard(path)
        rows.append(scanned.rows)
        shards.append(scanned.shard)
    names = [str(n) for n in range(classes)]
    index = ShardIndex(folder, shards, np.concatenate(rows).astype(ROW), names, names)
    index.save()
    return index


def png(pixels: np.ndarray) -> bytes:
    """uint8 pixels (height, width, 3) as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def casts(count: int, seed: int) -> Iterator[tuple[str, bytes, int]]:
    """Images that a few steps can learn from any part of them: noise with a cast of red, green, blue or none."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        label = number % 4
        pixels = rng.integers(0, 120, (32, 32, 3), dtype=np.uint8)
        if label < 3:
            pixels[:, :, label] += 100
        yield f"{number:06d}", png(pixels), label


@pytest.fixture(scope="session")
def cast_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ (200 samples in 4 shards) and val/ (37 samples in 2 shards) of four classes."""
    root = tmp_path_factory.mktemp("casts")
    write_split(root / "train", casts(200, seed=1), shard_samples=60, classes=4)
    write_split(root / "val", casts(37, seed=2), shard_samples=20, classes=4)
    return root


SMALL_RECIPE = """
[model]
arch = "crate_demo"
image_size = 32
patch_size = 8

[data]
workers = 1

[order]
lanes = 4
window = 32

[images]
eval_crop = 1.0
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]

[optim]
name = "lion"
lr = 3e-4
weight_decay = 0.1
warmup_epochs = 1

[train]
global_batch = 24
micro_batch = 6
epochs = 3

[checkpoint]
every_steps = 5

[log]
every_steps = 1
"""


@pytest.fixture
def small_recipe(tmp_path: Path) -> Path:
    """A recipe file for cast_shards: 25 steps of a global batch of 24, three epochs."""
    path = tmp_path / "small.toml"
    path.write_text(SMALL_RECIPE)
    return path


@pytest.fixture(scope="session")
def undisturbed_run(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """A run on two ranks that nobody disturbed, for those that are disturbed to be held against."""
    from tests.chaos.reference import undisturbed

    return undisturbed(tmp_path_factory.mktemp("trials"))[0]


@pytest.fixture
def trial(undisturbed_run: Trial) -> Trial:
    """The same run, yet to be started and to be disturbed."""
    from tests.chaos.trial import Trial

    number = len(list(undisturbed_run.folder.parent.iterdir()))
    return Trial(undisturbed_run.folder.with_name(f"trial-{number:03d}"), undisturbed_run.arguments, undisturbed_run)
