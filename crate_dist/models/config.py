"""What decides the function that a model computes. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from crate_dist.config import ModelSection
from crate_dist.config.archs import Arch
from crate_dist.config.rules import check_model, with_defaults

Pool = Literal["cls", "mean"]
CHANNELS = 3


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Arch):
    """Everything that decides the function which a model computes, up to its weights.

    image_size, patch_size: side in pixels; pool: what the linear head reads, the class token or the mean of all tokens;
    dropout: of the attention and its output; emb_dropout: of the embedded tokens; drop_path: share of the images for
    which training leaves out a residual branch; ista_step: η; ista_threshold: λ; options: all numbers of the parts'
    own, those that are not given by the defaults of config/parts.py. Raises ValueError as `rules.check_model` does.
    """

    image_size: int
    patch_size: int
    num_classes: int
    pool: Pool = "cls"
    dropout: float = 0.0
    emb_dropout: float = 0.0
    drop_path: float = 0.0
    ista_step: float = 0.1
    ista_threshold: float = 0.1
    options: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_model(self, self.image_size, self.patch_size, self.pool, self.options)
        object.__setattr__(self, "options", with_defaults(self, self.options))

    def option(self, name: str) -> float:
        """Returns a number that a part has of its own."""
        return self.options[name]

    @property
    def num_patches(self) -> int:
        """Patches per image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        """Tokens per image in the layers: the patches, and the class token where there is one."""
        return self.num_patches + self.class_token


def model_config(section: ModelSection, num_classes: int) -> ModelConfig:
    """Returns the architecture that a recipe's [model] means, on data with `num_classes` classes.

    Raises ValueError when the recipe names fewer classes than the data has, or parts that do not go together.
    """
    if section.num_classes is not None and section.num_classes < num_classes:
        raise ValueError(
            f"model.num_classes is {section.num_classes}, but the data has {num_classes} classes; "
            "leave it unset, or name at least as many"
        )
    return ModelConfig(
        **asdict(section.parts()),
        image_size=section.image_size,
        patch_size=section.patch_size,
        num_classes=section.num_classes or num_classes,
        pool=section.pool,
        dropout=section.dropout,
        emb_dropout=section.emb_dropout,
        drop_path=section.drop_path,
        ista_step=section.ista_step,
        ista_threshold=section.ista_threshold,
        options=section.options,
    )
