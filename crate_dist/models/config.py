"""What decides the function that a model computes. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from crate_dist.config import ModelSection
from crate_dist.config.archs import Arch, check_mixer, check_options, check_patches, options_of

Pool = Literal["cls", "mean"]
CHANNELS = 3


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Arch):
    """Everything that decides the function which a model computes, up to its weights.

    image_size, patch_size: side in pixels; pool: what the linear head reads, the class token or the mean of all tokens;
    dropout: of the attention and its output; emb_dropout: of the embedded tokens; drop_path: share of the images for
    which training leaves out a residual branch; ista_step: η; ista_threshold: λ; options: numbers of the parts' own,
    where they are not the defaults of config/parts.py.
    Raises ValueError when patches do not tile the image or the stem has none of the size, heads do not divide the
    width, there is no class token to be read or for the mixer, or one too many, or no part takes an option.
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
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        check_patches(self, self.patch_size)
        check_options(self, self.options)
        check_mixer(self)
        if self.dim % self.heads:
            fitting = [str(n) for n in range(1, min(self.dim, 32) + 1) if self.dim % n == 0]
            raise ValueError(
                f"width {self.dim} does not divide into {self.heads} heads; it does into {', '.join(fitting)}"
            )
        if self.pool not in ("cls", "mean"):
            raise ValueError(f'pool is "cls" or "mean", not {self.pool!r}')
        if self.head == "linear" and self.pool == "cls" and not self.class_token:
            raise ValueError('there is no class token for the head to read; pool = "mean" reads the patches')
        if self.head == "class_attention" and self.class_token:
            raise ValueError("the head of class attention brings the class token: class_token = false in the layers")

    def option(self, name: str) -> float:
        """Returns a number that a part has of its own: the recipe's, else the default of config/parts.py."""
        return self.options.get(name, options_of(self)[name])

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
