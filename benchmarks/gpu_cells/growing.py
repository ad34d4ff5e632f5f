"""A training step of an 8B-shaped Llama with growing batches in 24 GiB: all blocks recomputed, some of them, or none.

Without recomputation the longest batches do not fit; with a limit, fewer blocks keep their activations the longer the
batch is.
"""

import time
from collections.abc import Iterator

import torch

from benchmarks import llama, peers
from benchmarks.gpu_cells import Row, memory
from benchmarks.timing import synchronize
from lightning_qlora.activations.gradient_checkpointing import (
    RecomputedForward,
    budget_of,
    enable_gradient_checkpointing,
)
from lightning_qlora.dtypes.instance_method import remove

LIMIT = 24 << 30  # bytes of the process
LENGTHS = (512, 512, 1024, 2048, 4096, 8192, 512)  # the first step of each setting measures what the next ones need


def measure(device: torch.device, small: bool) -> Iterator[Row]:
    """Seconds of a step, peak bytes and blocks that keep their activations, by setting and tokens."""
    shape, lengths, r = (llama.SMALL, (8, 8, 16), 4) if small else (llama.LLAMA_8B, LENGTHS, 16)
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(LIMIT / torch.cuda.mem_get_info(device)[1], device)
    model = llama.build(shape, llama.VARIANTS[peers.OURS], r, device)
    step_optimizer = llama.adamw(model)
    for setting in (True, LIMIT, False):
        if setting:
            enable_gradient_checkpointing(model, setting)
        else:
            for block in model.modules():
                remove(block, RecomputedForward)
        for length in lengths:
            tokens = torch.randint(shape["vocab_size"], (1, length), device=device)
            memory.reset_peak(device)
            start = time.perf_counter()
            row: Row = {"gradient_checkpointing": setting, "tokens": length}
            try:
                row["loss"] = float(llama.trainer(model, step_optimizer, tokens)())
                synchronize(device)
                row["seconds"] = time.perf_counter() - start
            except torch.OutOfMemoryError:
                row["failure"] = "out of memory"
                step_optimizer.zero_grad(set_to_none=True)
            budget = budget_of(model.modules())
            kept = None if budget is None else budget.kept_blocks
            yield {**row, "kept_blocks": kept, "allocated_bytes": memory.peak_allocated(device)}
