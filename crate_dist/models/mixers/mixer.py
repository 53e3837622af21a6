"""What every token mixer offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from crate_dist.models.rates import Measures, alignment, orthonormality_error, subspace_coherence


class Mixer(nn.Module, ABC):
    """A token mixer, built of a ModelConfig: `attend` of what `project` returns. The rest is what the white box shows.

    key: its name among the layer's parameters, `layers.N.<key>.…`
    no_subspaces: what is said where `coordinates` returns None
    square_alone: whether it takes square grids of patches alone
    """

    key: ClassVar[str]
    no_subspaces: ClassVar[str] = "has no subspaces"
    square_alone: ClassVar[bool] = False

    def set_grid(self, rows: int, cols: int) -> None:
        """Is told how many rows and columns of patches the tokens have from now on.

        Raises ValueError when the mixer does not take such a grid.
        """

    @abstractmethod
    def project(self, z: Tensor) -> Tensor:
        """Returns what `attend` needs of tokens (b, n, d), images first; in subspaces: (b, h, n, p)."""

    @abstractmethod
    def attend(self, w: Tensor) -> Tensor:
        """Returns the mixed tokens (b, n, d), of what `project` has returned."""

    def forward(self, z: Tensor) -> Tensor:
        """(b, n, d) -> (b, n, d)"""
        return self.attend(self.project(z))

    def coordinates(self, w: Tensor) -> Tensor | None:
        """Returns the tokens in the mixer's subspaces, (b, h, n, p), whose coding rate is R^c; None: it has none."""
        return None

    def keys(self, w: Tensor) -> Tensor:
        """Returns what the mixer knows tokens by, (b, h, n, p): pictures find objects in it."""
        return w

    def attention(self, w: Tensor, queries: slice = slice(None)) -> Tensor | None:
        """Returns the map by which tokens look at each other, fp32 (b, h, n, n), rows sum to one; None: it has none.

        queries: the rows of it that are asked for
        """
        return None

    def membership(self, w: Tensor) -> Tensor | None:
        """Returns how much of each token each head takes, fp32 (b, h, n), heads sum to one; None: all take all."""
        return None

    def measures(self, w: Tensor) -> Measures:
        """Returns what the mixer's paper measures of what `project` has returned, by name; see Measures."""
        return {}


class SubspaceMixer(Mixer):
    """A mixer whose first map is to learned subspaces, w = Uᵀ z, and whose last comes back from them, out = W […].

    subspaces: the module of Uᵀ, whose weight has the rows of U_1ᵀ, then U_2ᵀ, …; out: that of W, or nn.Identity
    """

    heads: int
    subspaces: nn.Module
    out: nn.Module

    def coordinates(self, w: Tensor) -> Tensor:
        """Returns the tokens in the subspaces, (b, h, n, p), whose coding rate is R^c."""
        return w

    def way_back(self) -> Tensor:
        """Returns W, the matrix (d, d) by which the mixer comes back from the subspaces, of a mixer that has one."""
        return self.out.get_parameter("weight")

    def measures(self, w: Tensor) -> Measures:
        """Returns how incoherent the subspaces are, how far each basis is from orthonormal, and how W is aligned.

        The derivation has orthonormal U_k that are incoherent to each other, and a multiple of [U_1 … U_K] for W.
        """
        weight = self.subspaces.get_parameter("weight")
        bases = weight.unflatten(0, (self.heads, -1))
        if self.heads == 1:
            coherence: Tensor | str = "there is one subspace"
        else:
            coherence = subspace_coherence(bases)
        aligned: Tensor | str = "there is no W behind a single head"
        if not isinstance(self.out, nn.Identity):
            aligned = alignment(self.way_back(), weight.mT)
        return {
            "subspace_coherence": coherence,
            "orthonormality_error": orthonormality_error(bases),
            "out_alignment": aligned,
        }
