"""Adapters folded into their base: in memory, or from folder to folder."""

from lightning_qlora.merging.module import merge

__all__ = ["merge"]
