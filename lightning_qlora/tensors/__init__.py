"""What is asked of a single tensor: its shard, its fingerprint, its type before."""
