"""What a run adds to a module: the Lightning plugin and conversion."""
