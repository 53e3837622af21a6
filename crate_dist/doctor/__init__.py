"""Examines a machine, and crate-dist on it: what a user runs first on a new GPU, and pastes into a bug report."""
