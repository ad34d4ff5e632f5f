"""A training step of a LLaMA-65B-shaped model on one card: does it need less than 48 GB, as in the QLoRA paper?

NF4 with double quantization, r 64 on all linear layers, 1 x 512 tokens, gradient checkpointing, bnb's AdamW8bit.
Its state (1.6 GB) pages through pinned memory, because no benchmark allocates more than 1 GiB of unified memory.
"""

import time
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from bitsandbytes.optim import AdamW8bit  # type: ignore[attr-defined]
from torch import nn

from benchmarks import llama, peers
from benchmarks.gpu_cells import Row, memory
from benchmarks.timing import synchronize, times
from lightning_qlora.optim.pager import Pager


def measure(device: torch.device, small: bool) -> Iterator[Row]:
    """Bytes after building, at the peak of the first step and of later steps; seconds of both."""
    shape, length, r = (llama.SMALL, 16, 4) if small else (llama.LLAMA_65B, 512, 64)
    start = time.perf_counter()
    model = llama.build(shape, llama.VARIANTS[peers.OURS], r, device)
    synchronize(device)
    memory.reset_peak(device)
    trained = sum(parameter.numel() for parameter in llama.adapters(model))
    yield {
        "build_seconds": time.perf_counter() - start,
        "base_parameters": base_parameters(shape),
        "trained_parameters": trained,
        "built_bytes": memory.allocated(device),
    }
    tokens = torch.randint(shape["vocab_size"], (1, length), device=device)
    state_bytes = 2 * trained
    with memory.paging_through_pinned_memory() if state_bytes > memory.MANAGED_LIMIT or small else nullcontext():
        yield from _steps(model, tokens, rounds=1 if small else 3)


def _steps(model: nn.Module, tokens: torch.Tensor, rounds: int) -> Iterator[Row]:
    device = tokens.device
    optimizer = AdamW8bit(llama.adapters(model), lr=1e-4)
    pager = Pager()
    pager.attach(optimizer)
    step = llama.trainer(model, optimizer, tokens)
    for name in ("first step", "later steps"):
        start = time.perf_counter()
        loss = step()
        synchronize(device)
        took = time.perf_counter() - start
        if name != "first step":
            took = sorted(times({"step": step}, device, rounds, flush=False, head_start=0)["step"])[rounds // 2]
        report = pager.report()
        yield {
            "steps": name,
            "tokens": tokens.numel(),
            "seconds": took,
            "loss": float(loss),  # type: ignore[arg-type]
            "paged": report.kind,
            "paged_bytes": report.nbytes,
            **memory.peaks(device),
        }
        memory.reset_peak(device)


def base_parameters(shape: dict[str, int]) -> int:
    """Number of parameters of a Llama without adapters and norms."""
    hidden = shape["hidden_size"]
    heads = shape["num_attention_heads"]
    key_value = hidden // heads * shape["num_key_value_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * shape["intermediate_size"]
    return shape["num_hidden_layers"] * layer + 2 * hidden * shape["vocab_size"]
