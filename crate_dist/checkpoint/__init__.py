"""Checkpoints: their format, how they are saved, found, resharded, opened, fine-tuned from and exported."""
