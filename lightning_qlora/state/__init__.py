"""The state of a converted module."""
