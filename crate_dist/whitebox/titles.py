"""What the measures of a layer are called for people. Imports no torch."""

from __future__ import annotations

_TITLES = {
    "coding_rate": "coding rate of what {mixer} reads [nats]",
    "coding_rate_change": "change of the coding rate by {mixer} [nats]",
    "token_coding_rate": "coding rate of the tokens [nats]",
    "zeros": "share of zeros in the code of {tokenwise}",
    "dead_tokens": "share of dead tokens",
    "dead_features": "share of dead features",
    "coherence": "coherence of the dictionary",
    "decoder_coherence": "coherence of the dictionary of the way back",
    "decoder_alignment": "cosine of the two dictionaries",
    "subspace_coherence": "coherence of the subspaces",
    "orthonormality_error": "orthonormality error of the bases",
    "out_alignment": "cosine of W and the subspaces",
    "membership": "membership, share of the tokens",
    "membership_entropy": "entropy of a token's membership",
    "membership_spread": "entropy of a head's membership",
    "head_rate": "variational coding rate of a head [nats]",
    "variational_rate": "variational coding rate [nats]",
    "representatives_rate": "coding rate of the representatives [nats]",
    "representatives_rate_change": "change of it by contraction [nats]",
    "coding_rate_with_lengths": "coding rate with the tokens' lengths [nats]",
    "gradient_norm": "gradient norm",
}

TOGETHER = {
    "share of dead tokens and features": ("dead_tokens", "dead_features"),
    "coherence": ("coherence", "decoder_coherence", "subspace_coherence"),
    "cosine": ("out_alignment", "decoder_alignment"),
    "entropy of the membership": ("membership_entropy", "membership_spread"),
}
"""Measures of one unit that share a pair of axes in a figure, by what stands at it."""


def measure_title(name: str, mixer: str = "the mixer", tokenwise: str = "the token-wise part") -> str:
    """Returns what a measure is called, its unit behind; one that a part has brought, by its name, in words."""
    return _TITLES.get(name, name.replace("_", " ")).format(mixer=mixer, tokenwise=tokenwise)
