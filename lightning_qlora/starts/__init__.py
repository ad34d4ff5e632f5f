"""Where adapters start, and the 4-bit base that belongs to a start."""

from lightning_qlora.starts.formulas import calibrated, moves_base, random_adapter, seed_of_layer, start

__all__ = ["calibrated", "moves_base", "random_adapter", "seed_of_layer", "start"]
