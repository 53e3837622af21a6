"""Sizes that several modules need: which way of computing suits them, and how they halve. Imports no torch."""

from __future__ import annotations


def ista_in_one_product(tokens: int, dim: int) -> bool:
    """Says whether ISTA on `tokens` tokens of `dim` features takes fewer operations by z (D - DᵀD) than (z - z Dᵀ) D.

    With N tokens the second takes 2 N d² multiply-adds forward and 4 N d² backward; the first N d² + d³ and twice that.
    What is computed again for the backward pass repeats the forward pass: the comparison is the same in every case.
    """
    return tokens > dim


def halving_widths(dim: int, patch_size: int) -> list[int]:
    """Returns the channels behind each convolution of stride 2 that makes patches of 2^k pixels: they double up to dim.

    config/parts.py has the sizes of the stem that has them, each with what the first width divides dim by.
    """
    halvings = patch_size.bit_length() - 1
    return [dim >> (halvings - number) for number in range(1, halvings + 1)]
