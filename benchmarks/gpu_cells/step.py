"""The training step of a model of the shape of Llama-8B: time, loss and peak memory of ours and of the peers.

All variants use the same base weights, tokens, torch.optim.AdamW, autocast to bf16 and gradient checkpointing; r 64 on
all linear layers, dropout 0.05 (the Unsloth-style layer has no dropout). All are on the device at the same time, share
the frozen embeddings and alternate. The peak of a variant is the peak of its own step minus the memory of the others.
"""

import statistics
import traceback
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks import llama, peers
from benchmarks.gpu_cells import Row, memory
from benchmarks.timing import times

LENGTHS = (512, 2048, 4096)
ROUNDS = 6


class Run:
    """One variant: its model and optimizer, and how many bytes of device memory belong to it."""

    def __init__(self, name: str, shape: dict[str, int], r: int, device: torch.device, like: nn.Module | None) -> None:
        before = memory.allocated(device)
        self.model = llama.build(shape, llama.VARIANTS[name], r, device, like)
        self.optimizer = llama.adamw(self.model)
        memory.reset_peak(device)
        self.own = memory.allocated(device) - before
        if like is not None:  # shared, but every model needs them
            weights = {like.get_input_embeddings().weight, like.get_output_embeddings().weight}  # type: ignore[operator]
            self.own += sum(weight.nbytes for weight in weights)
        self.loss: Tensor | None = None

    def take_tokens(self, tokens: Tensor) -> None:
        """Set the batch that the next steps train on."""
        self.trainer = llama.trainer(self.model, self.optimizer, tokens)

    def step(self) -> None:
        """One step. Frees the gradients, so that they do not count in the peak of another variant."""
        self.loss = self.trainer()  # type: ignore[assignment]
        self.optimizer.zero_grad(set_to_none=True)

    def peak(self, device: torch.device) -> int:
        """Peak bytes of a step without the memory of the other variants."""
        before = memory.allocated(device)
        memory.reset_peak(device)
        self.step()
        peak = memory.peak_allocated(device) - (before - self.own)
        self.own += memory.allocated(device) - before  # the first step allocates the optimizer state
        return peak


def against_dense(device: torch.device, small: bool) -> Iterator[Row]:
    """Ours and PEFT on a bf16 base model."""
    yield from _compare((peers.OURS, peers.DENSE), device, small)


def against_4bit(device: torch.device, small: bool) -> Iterator[Row]:
    """Ours and the variants that use bitsandbytes."""
    yield from _compare((peers.OURS, peers.BNB, peers.BNB_BF16, llama.UNSLOTH), device, small)


def _compare(names: Sequence[str], device: torch.device, small: bool) -> Iterator[Row]:
    shape, lengths, r = (llama.SMALL, (16, 32), 4) if small else (llama.LLAMA_8B, LENGTHS, 64)
    runs: dict[str, Run] = {}
    for name in names:
        if reason := peers.why_missing(*llama.VARIANTS[name].packages):
            yield {"variant": name, "skipped": reason}
            continue
        try:
            first = next(iter(runs.values()), None)
            runs[name] = Run(name, shape, r, device, None if first is None else first.model)
        except Exception as error:
            yield _failed(name, error)
    for length in lengths:
        tokens = torch.randint(shape["vocab_size"], (1, length), device=device)
        peaks: dict[str, int] = {}
        for name, run in [*runs.items()]:
            try:
                run.take_tokens(tokens)
                peaks[name] = run.peak(device)
            except Exception as error:
                yield _failed(name, error)
                del runs[name]
        functions = {name: run.step for name, run in runs.items()}
        taken = times(functions, device, 2 if small else ROUNDS, flush=False, head_start=0)
        for name, values in taken.items():
            loss = runs[name].loss
            yield {
                "variant": name,
                "tokens": length,
                "seconds": statistics.median(values),
                "fastest": min(values),
                "slowest": max(values),
                "loss": None if loss is None else loss.item(),
                "peak_allocated_bytes": peaks[name],
            }


def _failed(name: str, error: Exception) -> Row:
    traceback.print_exception(error)
    return {"variant": name, "skipped": f"{type(error).__name__}: {str(error)[:500]}"}
