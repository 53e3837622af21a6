"""What every token-wise part offers."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn


class TokenWise(nn.Module):
    """A token-wise part, built of a ModelConfig. All but `forward` is what figures ask for.

    key: its name among the layer's parameters, `layers.N.<key>.…`
    """

    key: ClassVar[str]

    def plan(self, tokens: int) -> None:
        """Chooses between equal ways to compute, for so many tokens at a time."""

    def forward(self, z: Tensor) -> Tensor:
        """(b, n, d) -> (b, n, d)"""
        raise NotImplementedError

    def code(self, z: Tensor) -> Tensor | None:
        """Returns the sparse code that it makes of tokens (b, n, d) on the way, (b, n, m); None: it makes none."""
        return None

    def measures(self, z: Tensor) -> dict[str, Tensor]:
        """Returns what the part's paper measures, one number per image, (b,), or one alone, by name."""
        return {}
