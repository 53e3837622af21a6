"""Which way of computing suits a size. Imports no torch."""

from __future__ import annotations


def ista_in_one_product(tokens: int, dim: int) -> bool:
    """Says whether ISTA on `tokens` tokens of `dim` features takes fewer operations by z (D - DᵀD) than (z - z Dᵀ) D.

    With N tokens the second takes 2 N d² multiply-adds forward and 4 N d² backward; the first N d² + d³ and twice that.
    What is computed again for the backward pass repeats the forward pass: the comparison is the same in every case.
    """
    return tokens > dim
