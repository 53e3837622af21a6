"""Says how the curves of a run stand in TensorBoard."""

from __future__ import annotations

_TITLES = {
    "coding_rate": "coding rate",
    "coding_rate_change": "change of the coding rate by MSSA",
    "zeros": "share of zeros after ISTA",
    "dead_tokens": "share of dead tokens",
    "dead_features": "share of dead features",
    "coherence": "coherence of the dictionary",
    "gradient_norm": "gradient norm",
}
CHARTS = {"white box, layer by layer": {title: rf"whitebox/{name}/layer-\d+" for name, title in _TITLES.items()}}
"""One chart of all layers for each measure."""
