"""The table [model] of a recipe: an architecture by name, and what is to be otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from crate_dist.config.archs import ARCHS, Arch
from crate_dist.config.keys import nearest
from crate_dist.config.parts import HEADS, INITS, MIXERS, RESIDUALS, STEMS, TOKENWISE
from crate_dist.config.rules import check_model, check_read, differing, with_defaults
from crate_dist.config.sections import AboveZero, Decay, Fraction, Positive, Section

_OF_ARCH = tuple("width" if field.name == "dim" else field.name for field in fields(Arch))


def _list(table: Mapping[str, object]) -> str:
    return ", ".join(table)


def _one_of(table: Mapping[str, object]) -> AfterValidator:
    """Returns the check that a text is one of a table's names; it may be unset."""

    def check(name: str | None) -> str | None:
        if name is not None and name not in table:
            raise ValueError(f"{name!r} is none of {', '.join(table)}{nearest(name, table)}")
        return name

    return AfterValidator(check)


class ModelSection(Section):
    """The model: an architecture by name, a row of config/archs.py, and what is to be otherwise; its resolution."""

    arch: Annotated[str, _one_of(ARCHS)] = Field(description=f"one of {', '.join(ARCHS)}")
    width: Positive | None = Field(None, description="features of a token; unset: arch's, as with all keys to init")
    depth: Positive | None = Field(None, description="number of layers")
    heads: Positive | None = Field(None, description="heads of the mixer; divide the width")
    ratio: Positive | None = Field(None, description="width within MLP and ODL to that of the tokens")
    stem: Annotated[str | None, _one_of(STEMS)] = Field(None, description=f"from images to patches: {_list(STEMS)}")
    positions: Literal["learned", "fourier"] | None = Field(None, description="what tells the tokens where they are")
    class_token: bool | None = Field(None, description="whether a class token goes through the layers")
    mixer: Annotated[str | None, _one_of(MIXERS)] = Field(None, description=f"token mixer: {_list(MIXERS)}")
    tokenwise: Annotated[str | None, _one_of(TOKENWISE)] = Field(None, description=f"of each token: {_list(TOKENWISE)}")
    residual: Annotated[str | None, _one_of(RESIDUALS)] = Field(None, description=f"pattern: {_list(RESIDUALS)}")
    head: Annotated[str | None, _one_of(HEADS)] = Field(None, description=f"from tokens to scores: {_list(HEADS)}")
    norm_eps: AboveZero | None = Field(None, description="added to the variance by the layers' norms")
    head_norm_eps: AboveZero | None = Field(None, description="added to the variance by the head's norm")
    in_bias: bool | None = Field(
        None, description="whether the mixer's first map has a bias; tssa and attention alone may have one"
    )
    out_bias: bool | None = Field(None, description="whether the mixer's output has a bias")
    layer_scale: Annotated[float, Field(ge=0)] | None = Field(
        None, description="first value of γ, by which pre_norm scales its branches; 0: no γ"
    )
    init: Annotated[str | None, _one_of(INITS)] = Field(None, description=f"first weights: {_list(INITS)}")
    image_size: Positive = Field(224, description="side of the square images, in pixels")
    patch_size: Positive = Field(16, description="side of the square patches, in pixels; divides image_size")
    num_classes: Positive | None = Field(
        None, description="classes of the head; unset: as many as the shards' index has"
    )
    pool: Literal["cls", "mean"] = Field(
        "cls", description="what the linear head reads: the class token, or all tokens' mean"
    )
    dropout: Fraction = Field(0.0, description="share of the activations that each layer drops in training")
    emb_dropout: Fraction = Field(0.0, description="share of the embedded patches' numbers that training drops")
    drop_path: Decay = Field(0.0, description="share of the images for which training leaves out a residual branch")
    ista_step: float = Field(0.1, gt=0, description="η, the step size of ISTA and ODL")
    ista_threshold: float = Field(0.1, ge=0, description="λ, the sparsity weight of ISTA and ODL")
    options: dict[str, int | float] = Field(
        {},
        description="numbers of the parts' own, such as options.cells of cbsa; unset: those of config/parts.py",
    )

    def parts(self) -> Arch:
        """Returns the architecture that `arch` names, with what this section has otherwise."""
        given = {"dim" if name == "width" else name: getattr(self, name) for name in _OF_ARCH}
        return replace(ARCHS[self.arch], **{name: value for name, value in given.items() if value is not None})

    def described(self) -> str:
        """Returns the architecture's name, with what is otherwise here: "crate_demo with mixer=tssa"."""
        other = differing(self.parts(), ARCHS[self.arch])
        usual = with_defaults(self.parts(), {})
        other |= {f"model.options.{name}": value for name, value in self.options.items() if value != usual[name]}
        words = [f"{key.removeprefix('model.')}={value}" for key, value in other.items()]
        return f"{self.arch} with {', '.join(words)}" if words else self.arch

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        arch = self.parts()
        check_model(arch, self.image_size, self.patch_size, self.pool, self.options)
        # A recipe that is kept holds the values that its parts had, whatever the defaults become.
        object.__setattr__(self, "options", with_defaults(arch, self.options))
        return self

    @model_validator(mode="after")
    def _given_to_be_read(self, info: ValidationInfo) -> Self:
        """Holds what load_recipe was given against what the parts read; a recipe that is kept has everything."""
        known = type(self).model_fields
        usual = {name: field.default for name, field in known.items()} | asdict(ARCHS[self.arch])
        for key, by_hand in (info.context or {}).items():
            if key.startswith("model.") and (name := key.removeprefix("model.")) in known:
                check_read(self.parts(), name, getattr(self, name), None if by_hand else usual[name])
        return self
