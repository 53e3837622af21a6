"""A real SLURM cluster of four nodes on one machine, and the tests that run on it."""
