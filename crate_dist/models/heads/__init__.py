"""Heads: tokens after the last layer (b, n, d) to class scores (b, classes). `features` is what `linear` reads."""
