"""Holds a trained model against splits of data: the common part of evaluate.py and probe.py.

Under torchrun or srun every rank takes its share of each split, else one process takes all.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from crate_dist.checkpoint.trained import Trained
from crate_dist.config import ImageSection
from crate_dist.data.folder import Indexed
from crate_dist.data.loader import Batch, Normalize, eval_loader, eval_transform
from crate_dist.data.workers import open_server
from crate_dist.distributed import gather_objects, init_distributed, leave_distributed, lost_a_rank
from crate_dist.errors import UserError
from crate_dist.models.kernels import choose_kernels
from crate_dist.models.transformer import Transformer
from crate_dist.terminal import complain
from crate_dist.world import World, detect_world

T = TypeVar("T")


class CannotMeasure(UserError):
    """A measurement that does not fit the model or the data; the message says what would do."""


EXPECTED_ERRORS = (UserError, OSError)


def check_output(path: Path | None) -> None:
    """Raises CannotMeasure for a file that could not be written after all the work."""
    if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
        reason = "it is a folder" if path.is_dir() else f"{path.absolute().parent} is no folder to write in"
        raise CannotMeasure(f"cannot write {path}: {reason}")


@dataclass(frozen=True)
class Frozen:
    """A model in eval mode on this rank's device, and the way of images to it."""

    model: Transformer
    name: str
    world: World
    device: torch.device
    images: ImageSection
    batch: int
    workers: int
    normalize: Normalize

    @classmethod
    def place(cls, trained: Trained, arguments: argparse.Namespace, world: World, device: torch.device) -> Frozen:
        """Brings the model to the device in the precision that was asked for."""
        precision = arguments.precision or trained.precision
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        choose_kernels()
        trained.model.set_execution(autocast=precision == "autocast", images=arguments.batch)
        return cls(
            trained.model.to(device, dtype).eval().requires_grad_(False),
            trained.name,
            world,
            device,
            trained.images,
            arguments.batch,
            arguments.workers,
            Normalize(trained.images.mean, trained.images.std, device, dtype),
        )

    def batches(self, index: Indexed, split: str, cropped: bool = False) -> tqdm[Batch]:
        """Yields this rank's share of a split, once, prepared as for evaluation; rank 0 shows a bar of that name.

        cropped: the images are so already, and nothing more is cut off
        """
        images = self.images.model_copy(update={"eval_crop": 1.0}) if cropped else self.images
        transform = eval_transform(images, self.model.config.image_size)
        rank, world_size = self.world.rank, self.world.world_size
        loader = eval_loader(index, rank, world_size, transform, self.batch, self.workers)
        return tqdm(loader, desc=split, unit="batch", disable=not self.shows, dynamic_ncols=True)

    def logits(self, images: Tensor) -> Tensor:
        """Takes uint8 images (n, height, width, 3) to logits (n, classes)."""
        logits: Tensor = self.model(self.normalize(images))
        return logits

    @property
    def shows(self) -> bool:
        """True where this rank shows progress to somebody."""
        return self.world.is_main and sys.stderr.isatty()


def run_on_ranks(prepare: Callable[[], T], work: Callable[[T, World, torch.device], Any]) -> int:
    """Lets the ranks meet, calls `prepare`, and `work` with what it gave. Returns the exit status.

    What a user can mend becomes a line on rank 0's stderr, for each different error, and ends all ranks.
    """
    open_server()
    world = detect_world()
    if not world.is_main:
        logging.getLogger("crate_dist").setLevel(logging.ERROR)  # rank 0 says for all what files do not tell
    try:
        device = init_distributed(world)
        try:
            prepared, problem = None, ""
            try:
                prepared = prepare()
            except EXPECTED_ERRORS as error:
                problem = str(error)
            problems = gather_objects(problem)
            if any(problems):
                for text in dict.fromkeys(filter(None, problems)) if world.is_main else ():
                    where = "" if all(problems) else f"rank {problems.index(text)}: "
                    complain(f"{where}{text}")
                return 1
            assert prepared is not None
            work(prepared, world, device)
        finally:
            leave_distributed()
    except EXPECTED_ERRORS as error:
        complain(error)
        return 1
    except RuntimeError as error:
        if not lost_a_rank(error):
            raise
        complain(f"rank {world.rank} has lost another rank, which says why")
        return 1
    return 0
