"""The published code's data path and its training from files, told in our own words; doctor/published.py has its step.

What its main.py does around the model is done in the same order with the same packages: files of class folders,
Pillow, torchvision's random-resized crop and flip (torchvision itself is not needed), a shuffling DataLoader, Lion or
AdamW, a rate that changes once per epoch. Nothing of crate_dist takes part but the recipe that says the numbers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from crate_dist.config import AugmentSection, ImageSection, Recipe, RecipeError
from crate_dist.doctor.checkouts import load_model
from crate_dist.doctor.published import CPU, Loop
from crate_dist.models.build import model_config

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def seeded_loop(recipe: Recipe, classes: int, reference: Path) -> Loop:
    """Returns its loop around its model under a recipe, on the CPU. Seeds the global generators, as its main does.

    Raises RecipeError when the loop cannot follow the recipe, and as load_model does.
    """
    optim = recipe.optim
    there = {"schedule": "reference", "grad_clip": 0, "decay": "all", "layer_decay": 1, "min_lr": 0, "warmup_lr": 0}
    if any(getattr(optim, key) != value for key, value in there.items()) or recipe.train.precision != "fp32":
        raise RecipeError(
            f"{recipe.name}: the published loop changes its rate once per epoch, clips no gradient, decays all "
            "weights and computes in fp32 on a CPU; give a recipe with "
            f"{', '.join(f'optim.{key}={value}' for key, value in there.items())} and train.precision=fp32"
        )
    random.seed(recipe.train.seed)
    torch.manual_seed(recipe.train.seed)
    return Loop(load_model(model_config(recipe.model, classes), reference), recipe)


def train_epochs(
    recipe: Recipe, source: Path, reference: Path, filter_name: str, label: str
) -> Iterator[dict[str, float]]:
    """Trains from scratch on source/train, and yields the numbers on source/test after every epoch, named as ours are.

    source: class folders of JPEGs; filter_name: of the crop's resize; label: before each line that it prints.
    Raises RecipeError as seeded_loop does.
    """
    size, batch, workers = recipe.model.image_size, recipe.train.global_batch, recipe.data.workers or 0
    normalise, short_side, resampling = (
        Normalise(recipe.images),
        round(size / recipe.images.eval_crop),
        FILTERS[filter_name],
    )
    files = Folder(
        source / "train", lambda image: normalise.image(random_crop(image, size, recipe.augment, resampling))
    )
    tests = Folder(source / "test", lambda image: normalise.image(centre(image, short_side, size, resampling)))
    published = seeded_loop(recipe, len(files.classes), reference)
    if len(files) % batch:
        raise RecipeError(
            f"{recipe.name}: {len(files)} images are no whole number of batches of {batch}: the published "
            "loop would take a smaller one at the end of each epoch, where ours goes on into the next"
        )
    batches = DataLoader(files, batch, shuffle=True, num_workers=workers)
    test_batches = DataLoader(tests, batch, shuffle=False, num_workers=workers)
    step = 0
    for epoch in range(recipe.train.epochs):
        losses, place = [], f"{label}epoch {epoch + 1}/{recipe.train.epochs}"
        for images, labels in batches:
            losses.append(published.step(images, labels).item())
            step += 1
            if step % recipe.log.every_steps == 0:
                print(f"{place}  step {step}  loss {losses[-1]:.4f}", flush=True)
        found = [(published.logits(images), labels) for images, labels in test_batches]
        logits, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        top1 = 100 * float((logits.argmax(1) == labels).double().mean())
        print(f"{place}  step {step}  top-1 {top1:.2f} %", flush=True)
        loss = float(F.cross_entropy(logits, labels))
        yield {"step": step, "train/loss": float(np.mean(losses)), "val/top1": top1, "val/loss": loss}
        published.scheduler.step()


def class_folders(root: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """Lists the classes, folders in sorted order, and each file in them with its class's place."""
    classes = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
    return classes, [(path, label) for label, name in enumerate(classes) for path in sorted((root / name).iterdir())]


class Folder(Dataset[tuple[Tensor, int]]):
    """A data set as ImageFolder has it: one file per sample, decoded with Pillow and transformed."""

    def __init__(self, root: Path, transform: Callable[[Image.Image], Tensor]) -> None:
        self.classes, self.files = class_folders(root)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        path, label = self.files[number]
        with Image.open(path) as image:
            return self.transform(image.convert("RGB")), label


def random_crop(image: Image.Image, size: int, augment: AugmentSection, resampling: Image.Resampling) -> Image.Image:
    """Does torchvision's RandomResizedCrop(size) and RandomHorizontalFlip, with `random`."""
    image = image.crop(_draw_box(*image.size, augment)).resize((size, size), resampling)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < augment.flip else image


def _draw_box(width: int, height: int, augment: AugmentSection) -> tuple[int, int, int, int]:
    """Draws area, log of the aspect and place uniformly; ten tries, then the whole (torchvision: its centre)."""
    for _ in range(10):
        area = random.uniform(*augment.crop_scale) * width * height
        aspect = math.exp(random.uniform(*map(math.log, augment.crop_ratio)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    return 0, 0, width, height


def centre(image: Image.Image, short_side: int, size: int, resampling: Image.Resampling) -> Image.Image:
    """Does torchvision's Resize(short_side) and CenterCrop(size): the long side rounds down, the offsets to even."""
    long_side = int(short_side * max(image.size) / min(image.size))
    wide = image.width > image.height
    image = image.resize((long_side, short_side) if wide else (short_side, long_side), resampling)
    left, top = (round((length - size) / 2) for length in image.size)
    return image.crop((left, top, left + size, top + size))


class Normalise:
    """(x - mean) / std for each channel of fp32 images (…, 3, height, width), in place."""

    def __init__(self, images: ImageSection, device: torch.device = CPU) -> None:
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (images.mean, images.std))

    def __call__(self, images: Tensor) -> Tensor:
        return images.sub_(self.mean).div_(self.std)

    def image(self, image: Image.Image) -> Tensor:
        """Returns (3, height, width) of a Pillow image: ToTensor and Normalize."""
        return self(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255))

    def batch(self, images: Tensor) -> Tensor:
        """Returns (n, 3, height, width) of uint8 images (n, height, width, 3)."""
        return self(images.permute(0, 3, 1, 2).float() / 255)
