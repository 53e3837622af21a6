"""benchmarks/cifar10.py equal: ours and the published code's model and loop take the same steps on the same batches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from published import Normalise, seeded_loop
from tqdm import tqdm

from crate_dist.config import Recipe
from crate_dist.data.loader import Share, TrainLoader, eval_loader, eval_transform, train_transform
from crate_dist.data.order import Order
from crate_dist.data.splits import open_splits
from crate_dist.distributed import init_distributed, leave_distributed
from crate_dist.models.build import build_model
from crate_dist.training.optim import Schedule, learning_rate
from crate_dist.world import detect_world

MARKS = (1, 10, 100)
"""Steps up to which the largest difference of the losses is told, beside that of all."""


def compare(recipe: Recipe, reference: Path, steps: int) -> dict[str, Any]:
    """Returns the largest differences from the published code: of losses, and of logits on all test images; on the CPU.

    Ours is the model under training.engine with ZeRO-2, our schedule and our normalisation of uint8 batches. The
    batches are those of our loader. The control is the published code itself from weights that are changed in their
    last bit: what rounding alone does. Raises RecipeError as seeded_loop does.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from crate_dist.training.engine import Engine

    device = init_distributed(detect_world())
    try:
        train_index, val_index = open_splits(recipe)
        assert val_index is not None
        batch, side, workers = recipe.train.global_batch, recipe.model.image_size, recipe.data.workers
        schedule = Schedule(recipe.train.epochs, train_index.num_samples, batch)
        order = Order(train_index.shard_sizes, recipe.train.seed, recipe.lanes, recipe.order.window)
        transform = train_transform(recipe.augment, recipe.images, side)
        batches = TrainLoader(train_index, order, Share(0, 1, batch, batch), transform, workers)
        as_tested = eval_transform(recipe.images, side)
        tests = [found.images for found in eval_loader(val_index, 0, 1, as_tested, batch, workers)]
        classes = train_index.num_classes
        published, control = (seeded_loop(recipe, classes, reference) for _ in range(2))
        perturb(control.model)
        engine = Engine(build_model(recipe.model, classes, recipe.train.seed), recipe, device, batch, 1)
        theirs = Normalise(recipe.images).batch

        def on_tests() -> dict[str, Any]:
            base = torch.cat([published.logits(theirs(images)) for images in tests])
            mine = torch.cat([engine.predict(images) for images in tests])
            changed = torch.cat([control.logits(theirs(images)) for images in tests])
            return {name: apart(logits, base) for name, logits in (("ours", mine), ("control", changed))}

        result: dict[str, Any] = {"images": sum(map(len, tests)), "steps": steps, "before": on_tests()}
        losses = []
        for step in tqdm(range(steps), unit="step"):
            found = next(batches)
            images, labels = theirs(found.images), found.labels.clone()
            lr = learning_rate(step, recipe.optim, schedule)
            mine = engine.step(iter([(found.images, found.labels)]), lr, step).loss.item()
            losses.append((mine, published.step(images, labels).item(), control.step(images, labels).item()))
            if schedule.epochs_completed(step + 1) > schedule.epochs_completed(step):
                published.scheduler.step()
                control.scheduler.step()
        result["losses"] = {
            name: {str(n): max(abs(row[place] - row[1]) for row in losses[:n]) for n in (*MARKS, steps) if n <= steps}
            for place, name in ((0, "ours"), (2, "control"))
        }
        result["after"] = on_tests()
        return result
    finally:
        leave_distributed()


@torch.no_grad()
def perturb(model: torch.nn.Module) -> None:
    """Changes every weight by one or no step of fp32, at random."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        ulp = torch.nextafter(weight, torch.full_like(weight, torch.inf)) - weight
        weight.add_(ulp * torch.randint(-1, 2, weight.shape, generator=generator))


def apart(logits: torch.Tensor, base: torch.Tensor) -> dict[str, float]:
    """Returns how far two outcomes for the same images are from each other."""
    agree = (logits.argmax(1) == base.argmax(1)).double().mean()
    return {"logits": float((logits - base).abs().max()), "same_percent": 100 * float(agree)}
