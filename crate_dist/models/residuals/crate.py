"""CRATE's layer."""

from __future__ import annotations

from torch import Tensor

from crate_dist.models.residuals.layer import Layer, dropped


class CrateLayer(Layer):
    """Compress, then sparsify: z = f(LN(z + m(LN z))). Only the mixer has a residual branch."""

    def compress(self, z: Tensor, w: Tensor, keep: Tensor | None = None) -> Tensor:
        """Returns z + m(LN z), (b, n, d)."""
        return z + dropped(self.mixer.attend(w), None if keep is None else keep[0])

    def sparsify(self, z: Tensor, keep: Tensor | None = None) -> Tensor:
        """Returns f(LN z), (b, n, d)."""
        return self.tokenwise(self.reads(z))
