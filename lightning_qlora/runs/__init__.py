"""A converted module in a run of Lightning: changes to Lightning and torch, and errors."""
