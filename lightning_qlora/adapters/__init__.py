"""Adapters of a module: saved, loaded, merged."""
