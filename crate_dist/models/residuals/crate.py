"""CRATE's layer."""

from __future__ import annotations

from torch import Tensor

from crate_dist.models.residuals.layer import Layer, dropped


class CrateLayer(Layer):
    """Compress, then sparsify: z = f(LN(z + m(LN z))). Only the mixer has a residual branch."""

    def compress(self, z: Tensor, w: Tensor, keep: Tensor | None = None) -> Tensor:
        """Returns z + m(LN z), (b, n, d)."""
        return z + dropped(self.mixer.attend(w), None if keep is None else keep[0])

    def update(self, z: Tensor, w: Tensor, keep: Tensor | None = None) -> Tensor:
        """Returns the layer's output, (b, n, d), from its input z and w = project(z)."""
        return self.tokenwise(self.reads(self.compress(z, w, keep)))
