"""Train CRATE, the white-box transformer, on WebDataset shards with DeepSpeed ZeRO-2 across a SLURM cluster."""

__version__ = "0.1.0"
