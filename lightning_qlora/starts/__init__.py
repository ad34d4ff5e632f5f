"""How adapters begin."""
