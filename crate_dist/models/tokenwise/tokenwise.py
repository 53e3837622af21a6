"""What every token-wise part offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from crate_dist.models.rates import Measures


class TokenWise(nn.Module, ABC):
    """A token-wise part, built of a ModelConfig. All but `forward` and `plan` is what the white box shows.

    key: its name among the layer's parameters, `layers.N.<key>.…`
    no_code: what is said where `code` returns None
    """

    key: ClassVar[str]
    no_code: ClassVar[str] = "makes no sparse code"

    def plan(self, tokens: int) -> None:
        """Chooses between equal ways to compute, for so many tokens at a time."""

    @abstractmethod
    def forward(self, z: Tensor) -> Tensor:
        """(b, n, d) -> (b, n, d)"""

    def code(self, z: Tensor) -> Tensor | None:
        """Returns the sparse code that it makes of tokens (b, n, d) on the way, (b, n, m); None: it makes none."""
        return None

    def measures(self, z: Tensor) -> Measures:
        """Returns what the part's paper measures of the tokens that it reads, by name; see Measures."""
        return {}
