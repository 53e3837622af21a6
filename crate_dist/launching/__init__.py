"""Shared by all ways to start a run: options, checks, opening its folder, local ranks, memory. Imports no torch."""
