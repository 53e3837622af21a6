"""Compares our pixels with the published code's, on real images: evaluation, and the crops of training.

    python benchmarks/pixels.py --source DIR [--images N]

DIR holds images in folders of any depth. The published code reads with Pillow and resizes as torchvision does with
Pillow's images; published.centre is that in our own words. Differences are in steps of 255.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import measuring  # isort: skip
import numpy as np
from PIL import Image
from published import FILTERS, centre

from crate_dist.config import ResizeFilter
from crate_dist.data.decode import IMAGE_SUFFIXES, Pixels, open_image, resized_exactly
from crate_dist.data.transforms import EvalTransform, TrainTransform, sample_rng

SIZE, SHORT_SIDE = 224, 256


def main() -> int:
    """Prints one row for each pair of pixels."""
    parser = measuring.parser(__doc__, measuring.JSON)
    parser.add_argument("--source", type=Path, required=True, metavar="DIR")
    parser.add_argument("--images", type=int, default=400, metavar="N", help="[%(default)s]")
    given = parser.parse_args()
    files = [path for path in sorted(given.source.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES][: given.images]
    if not files:
        parser.error(f"no images in {given.source}")
    apart: dict[str, list[tuple[float, float, float]]] = {}
    for number, file in enumerate(files):
        for name, (ours, published) in compared(file.read_bytes(), number).items():
            steps = np.abs(ours.astype(float) - published)
            found = float(steps.mean()), float(steps.max()), measuring.psnr_db(ours, published)
            apart.setdefault(name, []).append(found)
    measuring.print_table(
        ["against the published code", "images that differ", "mean", "largest", "PSNR: median, least"],
        ([name, *over_all(*np.transpose(images))] for name, images in apart.items()),
        "s s .3f .0f s",
    )
    measuring.write_json(given.json, {"machine": measuring.machine("pillow", "simplejpeg", "torch"), "images": apart})
    return 0


def compared(data: bytes, number: int) -> dict[str, tuple[Pixels, Pixels]]:
    """Returns ours and theirs of one image, by name."""
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
    """Returns what the published code evaluates, before it is a tensor."""
    return np.asarray(centre(Image.open(io.BytesIO(data)).convert("RGB"), SHORT_SIDE, SIZE, resampling))


def over_all(means: np.ndarray, largest: np.ndarray, psnr: np.ndarray) -> list[object]:
    """Returns the differences over all images, each of them given per image."""
    shown = f"{np.median(psnr):.1f}, {psnr.min():.1f} dB" if largest.any() else "equal"
    return [f"{(largest > 0).sum()} of {len(means)}", means.mean(), largest.max(), shown]


if __name__ == "__main__":
    sys.exit(main())
