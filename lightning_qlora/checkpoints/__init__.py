"""The state of a converted module: its state dicts, and what files say of it."""
