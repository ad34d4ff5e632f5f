"""Every kernel on small and odd shapes under the memcheck tool of compute-sanitizer."""

import os
import subprocess
import sys
from collections.abc import Iterator
from shutil import which

import torch

from benchmarks.gpu_cells import Row
from benchmarks.measure import ROOT
from lightning_qlora.kernels import ops
from lightning_qlora.kernels.grouped_linear import can_group, grouped_linear
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.lora_linear import lora_linear
from lightning_qlora.quantization.packed_weight import stack_bytes

SHAPES = ((3, 5), (128, 64), (257, 192))  # [out, in]


def measure(device: torch.device, small: bool) -> Iterator[Row]:
    """The number of errors that memcheck finds. Without memcheck or a GPU the ops only run."""
    if device.type != "cuda" or not which("compute-sanitizer"):
        run_kernels(device)
        yield {"skipped": "no GPU" if device.type != "cuda" else "compute-sanitizer is not installed"}
        return
    command = ["compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"]
    run = subprocess.run(
        [*command, sys.executable, "-m", "benchmarks.gpu_cells.sanitizer"],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        # Without torch's cache every tensor is a separate allocation, whose bounds memcheck knows.
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )  # fmt: skip
    print(run.stdout[-8000:], flush=True)
    if run.returncode not in (0, 9):
        raise RuntimeError(f"compute-sanitizer ended with status {run.returncode}.")
    summary = [line.strip("= ") for line in run.stdout.splitlines() if "ERROR SUMMARY" in line]
    yield {"errors_found": run.returncode == 9, "summary": summary}


def run_kernels(device: torch.device) -> None:
    """Quantize, dequantize, the layer with few and many rows, with and without dropout, and experts."""
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for block_size, double_quant in ((64, True), (64, False), (4096, True)):
                weight = ops.quantize(torch.randn(shape, device=device, dtype=dtype), "nf4", block_size, double_quant)
                ops.dequantize(weight.to_bytes(), dtype)
            a = torch.randn(4, shape[1], device=device, requires_grad=True)
            b = torch.randn(shape[0], 4, device=device, requires_grad=True)
            for rows, p in ((1, 0.0), (16, 0.1), (33, 0.1)):
                x = torch.randn(rows, shape[1], device=device, dtype=dtype, requires_grad=True)
                seed = torch.tensor([2**40 + 3]) if p else None
                lora_linear(x, weight.to_bytes(), None, LoRA(a, b, 0.5, p, seed)).sum().backward()
            stack = stack_bytes([weight.to_bytes()] * 3)
            lora = LoRA(torch.stack([a] * 3), torch.stack([b] * 3), 0.5, p, seed)
            if can_group(x, stack, lora):
                ends = torch.tensor([20, 20, 31], dtype=torch.int32, device=device)
                grouped_linear(x, ends, stack, lora).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    run_kernels(torch.device("cuda", 0))
