"""The Lightning plugin: each hook calls a file of the folders above."""
