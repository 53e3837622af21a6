"""Stems: images (b, 3, height, width) to patches (b, patches, d)."""
