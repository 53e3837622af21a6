"""Talks with SLURM: what a job asks for, what its batch script does, what the queue says. Imports no torch."""
