"""Copies of a run's checkpoints behind a URL or on another mount, from which an empty run folder goes on. No torch."""
