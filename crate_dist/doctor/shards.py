"""Makes shards to examine with: pictures that a few steps learn, converted as anybody's would be."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from crate_dist.doctor.stage import Setting
from crate_dist.prep.convert import Options, convert
from crate_dist.prep.folders import ListOptions, image_folder
from crate_dist.prep.images import ImageOptions

CLASSES = 4


def trial_shards(setting: Setting) -> Path:
    """Returns the folder of shards for a `Trial`; the first stage that asks makes them for all of the examination."""
    folder = setting.scratch.parent / "trial"
    done = folder / "done"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        side = (32, 32) if setting.small else (320, 256)
        make_shards(folder, *((64, 32) if setting.small else (2048, 512)), *side)
        done.touch()
    return folder / "shards"


def make_shards(folder: Path, train: int, val: int, width: int, height: int) -> Path:
    """Writes shards of `train` and `val` JPEGs of four classes below `folder`, and returns the folder to give --data.

    A picture is smooth noise with grain, as large in bytes as a photo of that size, under a cast of red, green, blue
    or none, by which its class can be told from any part of it.
    """
    pictures, shards = folder / "pictures", folder / "shards"
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 140, (8, 12, 16, 3), dtype=np.uint8)
    grain = rng.integers(0, 48, (height, width, 3), dtype=np.uint8)

    def write(number: int) -> None:
        label = number % CLASSES
        split = "train" if number < train else "val"
        path = pictures / split / f"class{label}" / f"{number:06d}.jpg"
        coarse = Image.fromarray(np.roll(smooth[number // CLASSES % len(smooth)], number, axis=(0, 1)))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) // 2 + 20
        pixels = pixels + np.roll(grain, 7 * number, axis=1)
        if label < 3:
            pixels[:, :, label] += 90
        Image.fromarray(pixels).save(path, quality=92)

    for split in ("train", "val"):
        for label in range(CLASSES):
            (pictures / split / f"class{label}").mkdir(parents=True)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(train + val)))
    source = image_folder(pictures, ListOptions())
    options = Options(
        "crate_dist.doctor", pictures, shards, 1, 0, max(train // 8, 1), ImageOptions(), ListOptions(), dry_run=False
    )
    convert(source, options)
    return shards
