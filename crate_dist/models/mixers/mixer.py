"""What every token mixer offers."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn


class Mixer(nn.Module):
    """A token mixer, built of a ModelConfig: `attend` of what `project` returns. The rest is what figures ask for.

    key: its name among the layer's parameters, `layers.N.<key>.…`
    """

    key: ClassVar[str]

    def set_grid(self, rows: int, cols: int) -> None:
        """Is told how many rows and columns of patches the tokens have from now on.

        Raises ValueError when the mixer does not take such a grid.
        """

    def project(self, z: Tensor) -> Tensor:
        """Returns what `attend` needs of tokens (b, n, d): where there are subspaces, the coordinates (b, h, n, p)."""
        raise NotImplementedError

    def attend(self, w: Tensor) -> Tensor:
        """Returns the mixed tokens (b, n, d), of what `project` has returned."""
        raise NotImplementedError

    def forward(self, z: Tensor) -> Tensor:
        """(b, n, d) -> (b, n, d)"""
        return self.attend(self.project(z))

    def coordinates(self, w: Tensor) -> Tensor | None:
        """Returns the tokens in the mixer's subspaces, (…, h, n, p), whose coding rate is R^c; None: it has none."""
        return w

    def attention(self, w: Tensor, queries: slice = slice(None)) -> Tensor | None:
        """Returns the map by which tokens look at each other, fp32 (…, h, n, n), rows sum to one; None: it has none.

        queries: the rows of it that are asked for
        """
        return None

    def measures(self, w: Tensor) -> dict[str, Tensor]:
        """Returns what the mixer's paper measures, one number per image, (b,), or one alone, by name."""
        return {}
