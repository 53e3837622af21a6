"""Faults, one after the other, in real runs: what `make chaos` does, and a few of them in `make test`."""
