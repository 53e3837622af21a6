"""The published code's side of benchmarks/cifar10.py: its model, and its pipeline and loop told in our own words.

The model is imported from a checkout of the published code. What its main.py does around the model is done here in
the same order with the same packages: files of class folders, Pillow, torchvision's random-resized crop and flip
(torchvision itself is not needed), a shuffling DataLoader, Lion or AdamW, a rate that changes once per epoch, plain
fp32 where there is no GPU. Nothing of crate_dist takes part but the recipe that says the numbers.
"""

from __future__ import annotations

import importlib
import math
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lion_pytorch import Lion
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from crate_dist.config import AugmentSection, ImageSection, Recipe, RecipeError
from crate_dist.models.build import model_config

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def reference_model(recipe: Recipe, classes: int, reference: Path) -> Any:
    """Builds the published code's model in the size of a recipe; `reference` is a checkout of that code."""
    config = model_config(recipe.model, classes)
    sys.path.insert(0, str(reference))
    return importlib.import_module("model.crate").CRATE(
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=classes,
        dim=config.dim,
        depth=config.depth,
        heads=config.heads,
        dim_head=config.dim // config.heads,
    )


class Published:
    """Its model, optimizer and scheduler under a recipe, on the CPU. Seeds the global generators, as its main does.

    reference: a checkout of the published code. Raises RecipeError when its loop cannot follow the recipe.
    """

    def __init__(self, recipe: Recipe, classes: int, reference: Path) -> None:
        optim = recipe.optim
        if optim.schedule != "reference" or optim.grad_clip or not optim.decay_all or recipe.train.precision != "fp32":
            raise RecipeError(
                f"{recipe.name}: the published loop changes its rate once per epoch, clips no gradient, decays all "
                "weights and computes in fp32 on a CPU; give a recipe with optim.schedule=reference, "
                "optim.grad_clip=0, optim.decay_all=true and train.precision=fp32"
            )
        if not (reference / "model" / "crate.py").is_file():
            raise RecipeError(
                f"--reference {reference}: no model/crate.py there; give a checkout of the published code"
            )
        random.seed(recipe.train.seed)
        torch.manual_seed(recipe.train.seed)
        self.model = reference_model(recipe, classes, reference)
        self.optimizer: torch.optim.Optimizer
        if optim.name == "lion":
            self.optimizer = Lion(self.model.parameters(), lr=optim.lr, weight_decay=optim.weight_decay)
        else:
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(), lr=optim.lr, betas=(0.9, 0.999), weight_decay=optim.weight_decay
            )
        warmup, epochs = optim.warmup_epochs, recipe.train.epochs
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda epoch: min((epoch + 1) / (warmup + 1e-8), (math.cos(math.pi * epoch / epochs) + 1) / 2),
        )
        self._smoothing = optim.label_smoothing

    def step(self, images: Tensor, labels: Tensor) -> float:
        """One step on normalised images (n, 3, side, side); the loss before it."""
        self.model.train()
        loss = F.cross_entropy(self.model(images), labels, label_smoothing=self._smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """(n, classes) of normalised images (n, 3, side, side)."""
        self.model.eval()
        logits: Tensor = self.model(images)
        return logits


def train(
    recipe: Recipe, source: Path, reference: Path, filter_name: str, say: Callable[[str], None]
) -> Iterator[dict[str, float]]:
    """Trains from scratch on source/train, and yields the numbers on source/test after every epoch, named as ours are.

    source: class folders of JPEGs; filter_name: of the crop's resize. Raises RecipeError as Published does.
    """
    files = {split: Folder(source / split) for split in ("train", "test")}
    published = Published(recipe, len(files["train"].classes), reference)
    files["train"].transform = RandomCrop(recipe.model.image_size, recipe.augment, recipe.images, filter_name)
    files["test"].transform = Centre(recipe.model.image_size, recipe.images, filter_name)
    batch = recipe.train.global_batch
    if len(files["train"]) % batch:
        raise RecipeError(
            f"{recipe.name}: {len(files['train'])} images are no whole number of batches of {batch}: the published "
            "loop would take a smaller one at the end of each epoch, where ours goes on into the next"
        )
    batches = DataLoader(files["train"], batch, shuffle=True, num_workers=recipe.data.workers)
    test_batches = DataLoader(files["test"], batch, shuffle=False, num_workers=recipe.data.workers)
    step = 0
    for epoch in range(recipe.train.epochs):
        losses = []
        for images, labels in batches:
            losses.append(published.step(images, labels))
            step += 1
            if step % recipe.log.every_steps == 0:
                say(f"epoch {epoch + 1}/{recipe.train.epochs}  step {step}  loss {losses[-1]:.4f}")
        hits, loss = 0, 0.0
        for images, labels in test_batches:
            logits = published.logits(images)
            hits += int((logits.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        count = len(files["test"])
        row = {"step": step, "train/loss": float(np.mean(losses)), "val/top1": 100 * hits / count}
        say(f"epoch {epoch + 1}/{recipe.train.epochs}  step {step}  top-1 {row['val/top1']:.2f} %")
        yield {**row, "val/loss": loss / count}
        published.scheduler.step()


class Folder(Dataset[tuple[Tensor, int]]):
    """Reads as ImageFolder does: one file per sample, its label the place of its folder's name in sorted order."""

    def __init__(self, root: Path) -> None:
        self.classes = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
        self.samples = [
            (path, label) for label, name in enumerate(self.classes) for path in sorted((root / name).iterdir())
        ]
        self.transform: Callable[[Image.Image], Tensor] = _to_tensor

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        path, label = self.samples[number]
        with Image.open(path) as image:
            return self.transform(image.convert("RGB")), label


class RandomCrop:
    """torchvision's RandomResizedCrop, RandomHorizontalFlip, ToTensor and Normalize, on Pillow and `random`."""

    def __init__(self, size: int, augment: AugmentSection, images: ImageSection, filter_name: str) -> None:
        self.size, self.augment, self.filter = size, augment, FILTERS[filter_name]
        self.normalise = Normalise(images)

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, size, size), normalised."""
        image = image.crop(self.box(*image.size)).resize((self.size, self.size), self.filter)
        if random.random() < self.augment.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self.normalise(_to_tensor(image))

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Area uniform, aspect log-uniform, place uniform; ten tries, then the whole image (which is square here)."""
        for _ in range(10):
            area = random.uniform(*self.augment.crop_scale) * width * height
            aspect = math.exp(random.uniform(*map(math.log, self.augment.crop_ratio)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = random.randint(0, width - w), random.randint(0, height - h)
                return left, top, left + w, top + h
        return 0, 0, width, height


class Centre:
    """Resize of the short side, CenterCrop, ToTensor and Normalize."""

    def __init__(self, size: int, images: ImageSection, filter_name: str) -> None:
        self.size, self.short_side, self.filter = size, round(size / images.eval_crop), FILTERS[filter_name]
        self.normalise = Normalise(images)

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, size, size), normalised."""
        return self.normalise(_to_tensor(centre(image, self.short_side, self.size, self.filter)))


def centre(image: Image.Image, short_side: int, size: int, resampling: Image.Resampling) -> Image.Image:
    """torchvision's Resize(short_side) and CenterCrop(size): the long side rounds down, the offsets to even."""
    long_side = int(short_side * max(image.size) / min(image.size))
    wide = image.width > image.height
    image = image.resize((long_side, short_side) if wide else (short_side, long_side), resampling)
    left, top = (round((length - size) / 2) for length in image.size)
    return image.crop((left, top, left + size, top + size))


class Normalise:
    """(x - mean) / std for each channel of images (…, 3, height, width)."""

    def __init__(self, images: ImageSection) -> None:
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (images.mean, images.std))

    def __call__(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def _to_tensor(image: Image.Image) -> Tensor:
    pixels: Any = np.array(image)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div(255)
