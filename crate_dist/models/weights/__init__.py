"""Files of weights, in and out: ours, safetensors, and the published code's; and the model card beside them."""

from crate_dist.models.weights.read import load_model

__all__ = ["load_model"]
