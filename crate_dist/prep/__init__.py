"""From images as they are published to tar shards with an index. Training imports none of it."""
