"""Models: what they compute, how big they are, how they are built from a recipe or from other weights."""
