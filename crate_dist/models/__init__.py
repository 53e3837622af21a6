"""Models: CRATE, its sizes, and how one is built from a recipe or fitted to other weights."""
