"""Exact top-1 and top-5 over every sample of a split, each counted once, at any number of ranks.

    python -m crate_dist.evaluate runs/crate_base --data /data/imagenet-shards

takes a run folder (its newest checkpoint), one of its checkpoints, or a file of weights: an export of ours or a
checkpoint of the published code. Under torchrun or srun the ranks share the work.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from crate_dist.checkpoint import CheckpointError
from crate_dist.config import DATA_VARIABLE, RecipeError, location
from crate_dist.data.index import ShardError
from crate_dist.data.loader import Batch, Normalize, eval_loader
from crate_dist.data.splits import open_split
from crate_dist.distributed import detect_world, init_distributed
from crate_dist.models.weights import WeightsError
from crate_dist.subject import load_subject


@dataclass(frozen=True)
class Evaluation:
    """Accuracy in per cent, mean cross-entropy (without smoothing), and how many samples were counted."""

    top1: float
    top5: float
    loss: float
    samples: int
    replaced: int

    def scalars(self) -> dict[str, float]:
        """As TensorBoard names them."""
        return {"val/top1": self.top1, "val/top5": self.top5, "val/loss": self.loss}


@torch.inference_mode()
def evaluate(
    predict: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[Batch], device: torch.device
) -> Evaluation:
    """Counts over all ranks' batches. A collective, at the end alone: ranks may have different numbers of batches.

    predict: uint8 images (n, height, width, 3) -> logits (n, classes)
    """
    totals = torch.zeros(5, dtype=torch.float64, device=device)
    for batch in batches:
        logits, labels = predict(batch.images).float(), batch.labels.to(device, non_blocking=True)
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals += torch.stack(
            [
                hits[:, 0].sum().double(),
                hits.sum().double(),
                loss.double(),
                torch.tensor(len(labels), dtype=torch.float64, device=device),
                torch.tensor(len(batch.bad), dtype=torch.float64, device=device),
            ]
        )
    dist.all_reduce(totals)
    top1, top5, loss_sum, samples, replaced = totals.tolist()
    return Evaluation(100 * top1 / samples, 100 * top5 / samples, loss_sum / samples, int(samples), int(replaced))


def main(argv: list[str] | None = None) -> int:
    """Command line: evaluates one model on one split."""
    parser = argparse.ArgumentParser(
        prog="python -m crate_dist.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="RUN|CHECKPOINT|WEIGHTS", help="what to evaluate")
    parser.add_argument(
        "--data", type=location, metavar="DIR", help=f"folder or URL of the shards [the run's, then ${DATA_VARIABLE}]"
    )
    parser.add_argument("--split", default="val", help="folder in it [%(default)s]")
    parser.add_argument(
        "--batch", type=int, default=64, metavar="N", help="images at a time on each rank [%(default)s]"
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="loader processes per rank [%(default)s]")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="of the products [as in training]")
    arguments = parser.parse_args(argv)
    world = detect_world()
    try:
        subject = load_subject(arguments.model)
        root = arguments.data or subject.data.root or os.environ.get(DATA_VARIABLE)
        if root is None:
            raise RecipeError(f"no data folder: give --data DIR or export {DATA_VARIABLE}=DIR")
        index = open_split(location(root), arguments.split, subject.data)
        if index.num_classes > subject.model.config.num_classes:
            raise RecipeError(
                f"{index.place} has {index.num_classes} classes, the model only {subject.model.config.num_classes}"
            )
    except (CheckpointError, WeightsError, RecipeError, ShardError) as error:
        if world.is_main:
            print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    device = init_distributed(world)
    dtype = torch.bfloat16 if (arguments.precision or subject.precision) == "bf16" else torch.float32
    model = subject.model.to(device, dtype).eval()
    normalize = Normalize(subject.data, device, dtype)
    section = subject.data.model_copy(update={"workers": arguments.workers})
    side = model.config.image_size
    batches = eval_loader(index, world.rank, world.world_size, section, side, arguments.batch)
    shown = tqdm(batches, unit="batch", disable=not (world.is_main and sys.stderr.isatty()))
    result = evaluate(lambda images: model(normalize(images)), shown, device)
    if world.is_main:
        print(  # noqa: T201
            f"{subject.name} on {index.place}: top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %, "
            f"loss {result.loss:.4f}, {result.samples:,} samples"
            + (f", {result.replaced} replaced" if result.replaced else "")
        )
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
