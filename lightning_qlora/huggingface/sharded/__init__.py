"""Models that are sharded before their weights are read."""
