"""Measures how far our pixels are from the published code's, on real images: evaluation, and the crops of training.

    python benchmarks/pixels.py --source DIR [--images N]

DIR holds images in folders of any depth. The published code reads with Pillow and resizes as torchvision does with
Pillow's images; cifar10_published.centre is that in our own words. Differences are in steps of 255.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # so that what a bare Python lacks is told by crate_dist
import crate_dist  # noqa: F401  isort: skip
import numpy as np
from cifar10_published import FILTERS, centre
from PIL import Image

from crate_dist.config import ResizeFilter
from crate_dist.data.decode import IMAGE_SUFFIXES, Pixels, open_image, resized_exactly
from crate_dist.data.transforms import EvalTransform, TrainTransform, sample_rng

SIZE, SHORT_SIDE = 224, 256
Apart = tuple[float, float, float]
"""Mean and largest difference of two pictures, and the mean of its square."""


def main() -> None:
    """Prints one row for each pair of pixels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, metavar="DIR")
    parser.add_argument("--images", type=int, default=400, metavar="N", help="[%(default)s]")
    given = parser.parse_args()
    files = [path for path in sorted(given.source.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES][: given.images]
    if not files:
        parser.error(f"no images in {given.source}")
    apart: dict[str, list[Apart]] = {}
    for number, file in enumerate(files):
        for name, (ours, published) in compared(file.read_bytes(), number).items():
            apart.setdefault(name, []).append(difference(ours, published))
    print("| against the published code | images that differ | mean | largest | PSNR: median, least |")
    print("|---|---|---|---|---|")
    for name, images in apart.items():
        print(f"| {name} | {row(images)} |")


def compared(data: bytes, number: int) -> dict[str, tuple[Pixels, Pixels]]:
    """Ours and theirs of one image, by name."""
    found = {}
    published = {name: theirs(data, FILTERS[name]) for name in FILTERS}
    names: tuple[ResizeFilter, ...] = ("bilinear", "bicubic")
    for name in names:
        found[f"evaluation, {name}"] = EvalTransform(SIZE, SHORT_SIDE, name)(data), published[name]
        transform = TrainTransform(SIZE, flip=0.0, resize_filter=name)
        image = open_image(data)
        box, _, _ = transform.draw(image.size, sample_rng(0, 0, number))
        exact = resized_exactly(image, box, (SIZE, SIZE), name)
        found[f"the same crop in training, {name}"] = transform(data, sample_rng(0, 0, number)), exact
    found["evaluation, bicubic against its bilinear"] = published["bicubic"], published["bilinear"]
    return found


def theirs(data: bytes, resampling: Image.Resampling) -> Pixels:
    """Prepares what the published code evaluates, before it is a tensor."""
    return np.asarray(centre(Image.open(io.BytesIO(data)).convert("RGB"), SHORT_SIDE, SIZE, resampling))


def difference(ours: Pixels, published: Pixels) -> Apart:
    """Of one image."""
    apart = np.abs(ours.astype(float) - published)
    return float(apart.mean()), float(apart.max()), float((apart**2).mean())


def row(images: list[Apart]) -> str:
    """Differences over all images."""
    means, largest, squares = (np.array(values) for values in zip(*images, strict=True))
    psnr = 10 * np.log10(255**2 / np.maximum(squares, 1e-9))
    shown = f"{np.median(psnr):.1f}, {psnr.min():.1f} dB" if largest.any() else "equal"
    return f"{(largest > 0).sum()} of {len(images)} | {means.mean():.3f} | {largest.max():.0f} | {shown}"


if __name__ == "__main__":
    main()
