"""Does the fast step learn what the exact one learns? Losses of bf16 against fp32's, on real images.

    python benchmarks/numerics.py --source DIR_OF_CLASS_FOLDERS [--steps 200] [--batch 16] [--size 64]

The contestants take the same batches from the same weights, by training.engine on one rank: decoded, resized to
--size, in an order drawn once, with their classes as labels, at a rate that suits the small batch: where a run is not
stable, two that differ in one rounding part, and their difference says nothing. Printed is the difference of each
one's loss to fp32's: its mean and its largest over all steps, and its mean over each quarter, in which a drift would
be seen to grow. What rounding alone may do is shown by fp32 compiled, which computes in the same precision in another
order.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import measuring  # isort: skip
import numpy as np
import torch
from PIL import Image
from published import class_folders

from crate_dist.config import Recipe, load_recipe
from crate_dist.distributed import init_distributed, leave_distributed
from crate_dist.world import detect_world

BAND = 0.02
"""The largest mean difference of a quarter that passes."""


def main() -> int:
    """Prints the table; fails where a contestant leaves the band."""
    parser = measuring.parser(__doc__, measuring.arch("crate_tiny"), measuring.JSON)
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help="images in folders by class")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=200, metavar="N")
    parser.add_argument("--batch", type=int, default=16, metavar="N")
    parser.add_argument("--size", type=int, default=64, metavar="PIXELS")
    parser.add_argument("--lr", type=float, default=3e-5, help="rate after a rise over the first tenth [%(default)s]")
    parser.add_argument("--fp32-compiled", action="store_true", help="as well: what rounding alone may do")
    given = parser.parse_args()
    classes, files = class_folders(given.source)
    random.Random(0).shuffle(files)
    images = torch.from_numpy(np.stack([pixels(path, given.size) for path, _ in files]))
    labels = torch.tensor([label for _, label in files])
    init_distributed(detect_world())
    names = ["fp32", "bf16", "bf16, compiled", "autocast", "autocast, compiled"]
    losses: dict[str, list[float]] = {}
    for name in names + ["fp32, compiled"] * given.fp32_compiled:
        precision, _, compiled = name.partition(", ")
        settings = [f"train.precision={precision}", f"train.compile={str(bool(compiled)).lower()}"]
        settings += [f"train.global_batch={given.batch}", f"model.image_size={given.size}", f"optim.lr={given.lr}"]
        recipe = load_recipe(given.arch, settings + given.overrides)
        losses[name] = run(recipe, torch.device(given.device), images, labels, len(classes), given.steps)
    leave_distributed()
    exact = np.array(losses["fp32"])
    print(f"{measuring.in_words(measuring.machine('torch'))}; {given.device}")
    print(f"{given.arch}, {given.size} pixels, batch {given.batch}, {given.steps} steps, {len(files)}")
    print(f"images of {len(classes)} classes; fp32's loss: first {exact[0]:.4f}, last ten {exact[-10:].mean():.4f}\n")
    inside: dict[str, bool] = {}

    def compared() -> Iterator[list[object]]:
        for name, values in list(losses.items())[1:]:
            off = np.array(values) - exact
            quarters = [float(part.mean()) for part in np.array_split(off, 4)]
            inside[name] = max(map(abs, quarters)) < BAND
            shown = ", ".join(f"{quarter:+.4f}" for quarter in quarters)
            yield [name, np.abs(off).mean(), np.abs(off).max(), shown, np.mean(values[-10:])]

    head = ["against fp32", "mean difference", "largest", "by quarter", "last ten losses"]
    measuring.print_table(head, compared(), "s .4f .4f s .4f")
    said = ", ".join(f"{name}: {'kept' if kept else 'LEFT'}" for name, kept in inside.items())
    print(f"band, every quarter's mean within {BAND}: {said}")
    measuring.write_json(given.json, losses)
    return 0 if all(inside.values()) else 1


def pixels(path: Path, size: int) -> np.ndarray:
    """Returns the image, resized to size x size, uint8 (size, size, 3)."""
    with Image.open(path) as image:
        image.draft("RGB", (size, size))
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def run(
    recipe: Recipe, device: torch.device, images: torch.Tensor, labels: torch.Tensor, classes: int, steps: int
) -> list[float]:
    """Returns the loss of each step, at the recipe's rate after a rise over the first tenth."""
    from crate_dist.models.build import build_model
    from crate_dist.training.engine import Engine

    batch = recipe.train.global_batch
    engine = Engine(build_model(recipe.model, classes, seed=0), recipe, device, batch, 1)
    losses = []
    for step in range(steps):
        chosen = torch.arange(step * batch, (step + 1) * batch) % len(images)
        given = images[chosen].to(device), labels[chosen].to(device)
        rate = recipe.optim.lr * min(1.0, (step + 1) / (steps / 10))
        losses.append(engine.step(iter([given]), rate, step).loss)
    return torch.stack(losses).tolist()


if __name__ == "__main__":
    sys.exit(main())
