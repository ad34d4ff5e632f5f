"""Adapters that are initialized from the inputs of the first step."""
