"""Builds the model of a recipe, and names the size of a model."""

from __future__ import annotations

import torch

from crate_dist.config import ArchName, ModelSection
from crate_dist.models.crate import CRATE, CrateConfig
from crate_dist.models.sizes import ARCHS, ArchDims


def model_config(section: ModelSection, num_classes: int) -> CrateConfig:
    """Returns the architecture that a recipe's [model] means, on data with `num_classes` classes.

    Raises ValueError when the recipe names fewer classes than the data has.
    """
    if section.num_classes is not None and section.num_classes < num_classes:
        raise ValueError(
            f"model.num_classes is {section.num_classes}, but the data has {num_classes} classes; "
            "leave it unset, or name at least as many"
        )
    dims = ARCHS[section.arch]
    return CrateConfig(
        image_size=section.image_size,
        patch_size=section.patch_size,
        num_classes=section.num_classes or num_classes,
        dim=dims.dim,
        depth=dims.depth,
        heads=dims.heads,
        pool=section.pool,
        dropout=section.dropout,
        emb_dropout=section.emb_dropout,
        ista_step=section.ista_step,
        ista_threshold=section.ista_threshold,
    )


def build_model(section: ModelSection, num_classes: int, seed: int) -> CRATE:
    """Builds a freshly initialised fp32 model on the CPU, a function of the arguments: equal on all ranks.

    Leaves torch's random state as it was. Raises ValueError as `model_config` does.
    """
    return initialise(model_config(section, num_classes), seed)


def initialise(config: CrateConfig, seed: int) -> CRATE:
    """Builds a model of any dimensions, with the weights that the published code has under manual_seed(seed)."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the accelerators
        return CRATE(config)


def find_arch(config: CrateConfig) -> ArchName | None:
    """Returns the name of the size with the width, depth and heads of `config`, or None."""
    dims = ArchDims(config.dim, config.depth, config.heads)
    return next((name for name, known in ARCHS.items() if known == dims), None)


def find_published(dim: int, depth: int, patch_size: int) -> ArchName | None:
    """Returns the published size with this width and depth, which all have patches of 16 pixels, or None.

    The demo of its segmentation (`CRATE_base_demo`) has the width and depth of CRATE-B at patches of 8 pixels, and half
    as many heads: a size tells the heads at 16 alone.
    """
    sizes = ((name, known) for name, known in ARCHS.items() if name != "crate_demo" and patch_size == 16)
    return next((name for name, known in sizes if (known.dim, known.depth) == (dim, depth)), None)
