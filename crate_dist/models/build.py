"""Builds the model of a recipe, and names the size of a model."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from crate_dist.config import ModelSection
from crate_dist.config.archs import ARCHS, Arch
from crate_dist.models.config import ModelConfig, model_config
from crate_dist.models.transformer import Transformer


def build_model(section: ModelSection, num_classes: int, seed: int) -> Transformer:
    """Builds a freshly initialised fp32 model on the CPU, a function of the arguments: equal on all ranks.

    Leaves torch's random state as it was. Raises ValueError as `model_config` does.
    """
    return initialise(model_config(section, num_classes), seed)


def initialise(config: ModelConfig, seed: int) -> Transformer:
    """Builds a model of any dimensions, with the weights that the published code has under manual_seed(seed)."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the accelerators
        return Transformer(config)


def find_arch(config: ModelConfig) -> str | None:
    """Returns the name of the architecture with the width, depth, heads and parts of `config`, or None.

    The ε of the head's norm, which CRATE-α's two codes have differently, makes no other architecture.
    """
    parts = Arch(**{field.name: getattr(config, field.name) for field in fields(Arch)})
    return next(
        (name for name, known in ARCHS.items() if known == replace(parts, head_norm_eps=known.head_norm_eps)), None
    )
