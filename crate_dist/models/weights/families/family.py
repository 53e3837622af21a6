"""What is known of a family of models: whose it is, what the published code calls its weights, what they tell."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from einops import rearrange
from torch import Tensor

from crate_dist.config.archs import ARCHS, Arch
from crate_dist.models.config import CHANNELS

StateDict = Mapping[str, Tensor]
Turn = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models, as one published code has them.

    name, paper, citation: for people; paper: its number at arXiv; citation: BibTeX
    sizes: its rows in config/archs.py, each with the patch sizes at which width and depth tell it from all others
    parts: what all of its models have otherwise than these rows
    fewest_heads: with fewer, that code computes what no part here does
    names: our module paths, and theirs; {} stands for the number of a layer
    options: the numbers of their own that its parts have, as that code has them
    marks: our names of tensors by which its files are known
    turned: by our names, what makes our tensor of theirs, and theirs of ours, where these are not the same
    tells: what the shapes of its weights tell of a ModelConfig, by field, beside what those of all families do
    unbuilt: sizes that its code names, and fails to build
    key: of the state dict in the checkpoints of its training code; None: they are bare state dicts
    wrapped: whether that code saves its models as they are wrapped, "module." before the names
    evaluated, fine_tuned: how its code prepares images to be evaluated, and its fine-tuning code, in keys of [images],
    where that is not our default
    new_head: how our names begin of what its fine-tuning code does not take from the weights for a new head
    """

    name: str
    paper: str
    citation: str
    sizes: Mapping[str, tuple[int, ...]]
    names: Mapping[str, str]
    marks: tuple[str, ...]
    parts: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, float] = field(default_factory=dict)
    fewest_heads: int = 1
    turned: Mapping[str, tuple[Turn, Turn]] = field(default_factory=dict)
    tells: Callable[[StateDict], dict[str, Any]] = lambda _: {}
    unbuilt: tuple[str, ...] = ()
    key: str | None = "state_dict"
    wrapped: bool = True
    evaluated: Mapping[str, Any] = field(default_factory=lambda: {"resize_filter": "bilinear"})
    fine_tuned: Mapping[str, Any] = field(default_factory=lambda: {"resize_filter": "bilinear", "eval_fit": "stretch"})
    new_head: tuple[str, ...] = ("head.linear.",)

    def row(self, arch: str) -> Arch:
        """Returns the architecture of one of its sizes."""
        return replace(ARCHS[arch], **self.parts)

    def published(self, dim: int, depth: int, patch_size: int) -> str | None:
        """Returns the size with this width and depth, where its patches are such that they tell it; else None."""
        return next(
            (
                arch
                for arch, patches in self.sizes.items()
                if (ARCHS[arch].dim, ARCHS[arch].depth) == (dim, depth) and patch_size in patches
            ),
            None,
        )

    def their_marks(self) -> tuple[str, ...]:
        """Returns `marks` as the published code calls them."""
        rename = _renaming(self.names)
        return tuple(map(rename, self.marks))

    def to_ours(self, state_dict: StateDict) -> dict[str, Tensor]:
        """Renames the published code's tensors to ours; unknown names are kept. Raises ValueError as `rename_all`."""
        renamed = rename_all(state_dict, _renaming({theirs: ours for ours, theirs in self.names.items()}))
        return {name: self.turned[name][0](t) if name in self.turned else t for name, t in renamed.items()}

    def to_theirs(self, state_dict: StateDict, prefix: str = "") -> dict[str, Tensor]:
        """Renames our tensors to the published code's, with `prefix` ("module." or nothing) before each."""
        rename = _renaming(self.names)
        return {
            prefix + rename(name): self.turned[name][1](tensor) if name in self.turned else tensor
            for name, tensor in state_dict.items()
        }


def rename_all(state_dict: StateDict, rename: Callable[[str], str]) -> dict[str, Tensor]:
    """Returns the tensors under their new names. Raises ValueError where two would have the same."""
    before: dict[str, str] = {}
    for name in state_dict:
        if (other := before.setdefault(rename(name), name)) != name:
            raise ValueError(f"{other!r} and {name!r} are the same weight, {rename(name)!r}; leave one of them out")
    return {new: state_dict[name] for new, name in before.items()}


def _renaming(table: Mapping[str, str]) -> Callable[[str], str]:
    """Returns what renames by the first row of `table` whose left side is a whole module path at the name's start."""
    rows = [(re.compile(re.escape(old).replace(r"\{\}", r"(\d+)") + r"(?=\.|$)"), new) for old, new in table.items()]

    def rename(name: str) -> str:
        for pattern, new in rows:
            if match := pattern.match(name):
                return new.format(*match.groups()) + name[match.end() :]
        return name

    return rename


def _as_matrix(weight: Tensor) -> Tensor:
    """Turns the weight of a convolution, (d, 3, p, p), to that of a map of patches, (d, p² 3)."""
    return rearrange(weight, "d c y x -> d (y x c)").contiguous() if weight.ndim == 4 else weight


def _as_convolution(weight: Tensor) -> Tensor:
    """Turns the weight of a map of patches to that of a convolution."""
    side = math.isqrt(weight.shape[1] // CHANNELS)
    return rearrange(weight, "d (y x c) -> d c y x", y=side, x=side).contiguous()


NORM_AND_MAP = ("head.norm.", "head.linear.")
"""`new_head` of CRATE's fine-tuning code, which CBT's is a copy of: both stand in one module, `mlp_head`."""

CONVOLVED = {"patch_embed.proj.weight": (_as_matrix, _as_convolution)}
"""`turned` where the published stem is a convolution as wide as its stride."""


def only_head(state_dict: StateDict) -> dict[str, Any]:
    """Returns what MSSA tells: with a single head it has no output projection."""
    return {} if "layers.0.mssa.out.weight" in state_dict else {"heads": 1}


def ratio_of(state_dict: StateDict, name: str, axis: int) -> dict[str, Any]:
    """Returns the ratio, as one axis of a weight and the other tell it, where they do."""
    shape = state_dict[name].shape if name in state_dict else ()
    if len(shape) != 2 or not shape[1 - axis] or shape[axis] % shape[1 - axis]:
        return {}
    return {"ratio": shape[axis] // shape[1 - axis]}
