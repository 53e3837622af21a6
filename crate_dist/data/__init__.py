"""From tar shards to batches on the device: index, order, transforms, loader."""
