"""Checkpoints: the format, saving, finding and resharding; opening, fine-tuning and exporting what was trained."""
