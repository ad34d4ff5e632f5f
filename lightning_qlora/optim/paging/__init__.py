"""Optimizer state that moves between host and device memory."""
