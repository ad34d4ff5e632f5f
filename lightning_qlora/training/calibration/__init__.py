"""Adapters initialized from the first training batch."""
