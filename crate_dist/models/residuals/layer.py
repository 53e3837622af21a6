"""What every residual pattern is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import cast

import torch
from torch import Tensor, nn

from crate_dist.config.parts import MIXERS, TOKENWISE
from crate_dist.models.config import ModelConfig
from crate_dist.models.mixers.mixer import Mixer
from crate_dist.models.parts import find_part
from crate_dist.models.tokenwise.none import NoTokenWise
from crate_dist.models.tokenwise.tokenwise import TokenWise


class Layer(nn.Module, ABC):
    """A token mixer and a token-wise part, which both read normalised tokens.

    Their parameters are named after them: `mssa_norm`, `mssa`, `ista_norm`, `ista`. A pattern says in `compress` how
    the mixer changes the tokens, and in `sparsify` how the token-wise part does; without one it ends with the mixer.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._keys = list[str]()
        for part in (find_part(MIXERS, config.mixer), find_part(TOKENWISE, config.tokenwise)):
            self._check_key(part)
            self._keys.append(part.key)
            absent = issubclass(part, NoTokenWise)
            norm = nn.Identity() if absent else nn.LayerNorm(config.dim, eps=config.norm_eps)
            self.add_module(f"{part.key}_norm", norm)
            self.add_module(part.key, part(config))

    def _check_key(self, part: type[Mixer] | type[TokenWise]) -> None:
        """Raises ValueError when the layer has something else under the names that a part's key stands for."""
        key = part.key
        there = {*dir(self), *(f"{other}_scale" for other in self._keys)}
        taken = [name for name in (key, f"{key}_norm", f"{key}_scale") if name in there]
        if taken or not key.isidentifier():
            why = f"the layer has another {taken[0]}" if taken else "parameters are named after it"
            raise ValueError(f'{part.__name__} has key = "{key}", and {why}: take another name, such as "my_part"')

    @property
    def mixer(self) -> Mixer:
        """The token mixer."""
        return cast(Mixer, getattr(self, self._keys[0]))

    @property
    def tokenwise(self) -> TokenWise:
        """The token-wise part."""
        return cast(TokenWise, getattr(self, self._keys[1]))

    @property
    def norms(self) -> tuple[nn.Module, nn.Module]:
        """The norms before the one and before the other."""
        return getattr(self, f"{self._keys[0]}_norm"), getattr(self, f"{self._keys[1]}_norm")

    def project(self, z: Tensor) -> Tensor:
        """Returns what `update` needs of the mixer: (b, n, d) -> (b, h, n, p)."""
        return self.mixer.project(self.norms[0](z))

    @abstractmethod
    def compress(self, z: Tensor, w: Tensor, keep: Tensor | None = None) -> Tensor:
        """Returns the tokens after the mixer, (b, n, d), from the layer's input z and w = project(z).

        keep: drop path's factors of the mixer's branch and of the token-wise part's, (2, b); None: all ones
        """

    def reads(self, z: Tensor) -> Tensor:
        """Returns what the token-wise part reads, (b, n, d), of the tokens after the mixer."""
        normed: Tensor = self.norms[1](z)
        return normed

    @abstractmethod
    def sparsify(self, z: Tensor, keep: Tensor | None = None) -> Tensor:
        """Returns the layer's output, (b, n, d), from the tokens after the mixer. keep: as in `compress`"""

    def update(self, z: Tensor, w: Tensor, keep: Tensor | None = None) -> Tensor:
        """Returns the layer's output, (b, n, d), from its input z and w = project(z). keep: as in `compress`"""
        z = self.compress(z, w, keep)
        return z if isinstance(self.tokenwise, NoTokenWise) else self.sparsify(z, keep)

    def forward(self, z: Tensor, keep: Tensor | None = None) -> Tensor:
        """(b, n, d) -> (b, n, d)"""
        return self.update(z, self.project(z), keep)


def dropped(branch: Tensor, factors: Tensor | None) -> Tensor:
    """Scales each image of a branch (b, n, d) by its factor, fp32 (b,), and rounds once to the type of the tokens.

    That is fp32 under autocast, and otherwise the branch's own: in bf16 1 / 0.85 by itself would be 0.27 % off.
    """
    if factors is None:
        return branch
    scaled = branch * factors[:, None, None]
    return scaled if torch.is_autocast_enabled(branch.device.type) else scaled.to(branch.dtype)
