"""Reads and writes files: safetensors, Lightning checkpoints, folders that are written completely or not at all."""
