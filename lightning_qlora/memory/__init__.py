"""The planner: what a QLoRA run will take, without allocating any of it."""

from lightning_qlora.memory.estimate import MemoryEstimate, OptimizerName, estimate_memory

__all__ = ["MemoryEstimate", "OptimizerName", "estimate_memory"]
