"""The adapters of a module: saved, loaded, merged."""
