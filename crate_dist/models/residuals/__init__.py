"""Residual patterns: layers made of a token mixer, a token-wise part and the norms before them."""
