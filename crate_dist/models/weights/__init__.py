"""Files of weights, in and out: ours, safetensors, and the published code's; and the model card beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crate_dist.models.weights.read import load_model

__all__ = ["load_model"]

if not TYPE_CHECKING:  # which would let any name pass

    def __getattr__(name):
        if name != "load_model":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from crate_dist.models.weights.read import load_model  # which imports torch

        return load_model
